//! Made from `proto/` by `tests/generated.rs`. Not to be edited.
#![expect(missing_docs, reason = "the .proto files say what there is to say")]
#![allow(
    clippy::large_enum_variant,
    clippy::doc_markdown,
    clippy::doc_lazy_continuation,
    reason = "code that a generator wrote"
)]

#[rustfmt::skip]
pub mod envelope;
#[rustfmt::skip]
pub(crate) mod messages;
