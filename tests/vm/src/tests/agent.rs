//! `testudo-agent` as the init of a guest: containers in it, asked for by the protocol.

mod machine;
mod sees;

use crate::batch::Test;

pub(crate) fn tests() -> Vec<Test> {
    [machine::TESTS, sees::TESTS].concat()
}
