//! JSON documents, read by serde-json-core into places that an [`Object`] names.
//!
//! [`normalize`] goes over the text first. Then values are decoded a member at a time: each member
//! of an object is asked for the [`Place`] where it belongs, so that nothing large passes over the
//! stack, all of serde is compiled once and not once an object, and an error names the value:
//! `IPConfigs[0].Mask: must be from 0 to 128`.
//!
//! * A member that is `null` is as good as absent; unknown members are ignored.
//! * Of a member given twice the last one counts, as in Go's encoding/json; so a list is replaced,
//!   and of an object given twice the members are merged.
//! * A string with a NUL in it is refused where it would be used: the kernel's strings end there.

mod decode;
mod decoder;
mod normalize;
mod output;
mod place;

pub use decode::decode;
pub use normalize::{DEPTH, normalize};
pub use output::{Quoted, escape, escape_into};
pub use place::{Integer, Object, Objects, Parse, Place};
