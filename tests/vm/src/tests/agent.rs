//! `testudo-agent` as the init of a guest: containers in it, asked for by the protocol.

mod control;
mod machine;
mod sees;
mod shared;
mod streams;

use crate::batch::Test;

pub(crate) fn tests() -> Vec<Test> {
    [
        machine::TESTS,
        sees::TESTS,
        control::TESTS,
        shared::TESTS,
        streams::TESTS,
    ]
    .concat()
}
