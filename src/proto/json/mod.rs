//! JSON documents, decoded by serde-json-core into places that an [`Object`] provides.
//!
//! [`normalize`] validates the text first. Then values are decoded member by member: the object returns the
//! [`Place`] for each member, so that nothing large passes over the stack, serde's code is compiled once
//! instead of once per object, and an error names the value: `IPConfigs[0].Mask: must be from 0 to 128`.
//!
//! * A member that is `null` is the same as absent; unknown members are ignored.
//! * If a member occurs twice, the last one counts, as in Go's encoding/json: a list is replaced, objects are
//!   merged.
//! * A string with a NUL is refused where it would be used, as the kernel's strings end there.

mod decode;
mod decoder;
mod normalize;
mod output;
mod place;

pub use decode::decode;
pub use normalize::{DEPTH, normalize};
pub use output::{Quoted, escape, escape_into};
pub use place::{Integer, Object, Objects, Parse, Place};
