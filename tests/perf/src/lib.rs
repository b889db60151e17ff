//! What the measurements have in common.
#![allow(
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    reason = "measuring tools see no guest-controlled data"
)]

pub mod machine;
pub mod memory;
