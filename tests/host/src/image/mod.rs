//! Root images of container images.
pub mod layer;
pub mod source;
pub mod tree;
