//! INIT: what both sides can do.

use rustix::io::Errno;

use super::Caching;
use super::mapping::MAP_ALIGNMENT;
use super::server::{Answer, Answered, Call, Server};
use super::wire::{self, InitIn, InitOut, init};

/// Pages of one READ or WRITE: 1 MiB.
const MAX_PAGES: u16 = 256;
const MAX_WRITE: u32 = MAX_PAGES as u32 * 4096;

impl Server {
    /// What this export can do.
    fn features(&self) -> u64 {
        let mut features = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::SUBMOUNTS
            | init::INIT_EXT
            | init::DIRECT_IO_ALLOW_MMAP;
        let options = &self.options;
        let more = [
            (
                options.writeback && !options.readonly,
                init::WRITEBACK_CACHE,
            ),
            (options.caching == Caching::Always, init::CACHE_SYMLINKS),
            (options.acl, init::POSIX_ACL | init::DONT_MASK),
            (self.window.is_some(), init::MAP_ALIGNMENT),
            // A write through the window never comes here, so the guest takes set-user-id away
            // itself there; Linux does so only where the server has not promised to.
            (self.window.is_none(), init::HANDLE_KILLPRIV_V2),
        ];
        for (_, bits) in more.into_iter().filter(|(has, _)| *has) {
            features |= bits;
        }
        features
    }

    /// Begins a session; one that was there is forgotten.
    pub(super) fn init(&self, call: &mut Call<'_>) -> Answered {
        let asked: InitIn = call.args.take()?;
        let mut answer = InitOut {
            major: wire::VERSION_MAJOR,
            minor: wire::VERSION_MINOR,
            ..InitOut::default()
        };
        if asked.major > wire::VERSION_MAJOR {
            // It comes again with a version we speak.
            return Ok(call.put(&answer));
        }
        if asked.major < wire::VERSION_MAJOR || asked.minor < wire::VERSION_MINOR_LEAST {
            return Err(Errno::PROTO);
        }
        self.forget_session();
        let mut offered = u64::from(asked.flags);
        if offered & init::INIT_EXT != 0 {
            let [more]: [u32; 1] = call.args.take()?;
            offered |= u64::from(more) << 32;
        }
        let agreed = offered & self.features();
        self.begin_session(agreed);
        answer.max_readahead = asked.max_readahead;
        answer.flags = low(agreed);
        answer.flags2 = low(agreed >> 32);
        answer.max_background = u16::MAX;
        answer.congestion_threshold = u16::MAX / 4 * 3;
        answer.max_write = MAX_WRITE;
        answer.time_gran = 1;
        answer.max_pages = MAX_PAGES;
        if self.agreed(init::MAP_ALIGNMENT) {
            answer.map_alignment = MAP_ALIGNMENT;
        }
        call.put(&answer);
        Ok(Answer::Built)
    }
}

fn low(bits: u64) -> u32 {
    u32::try_from(bits & 0xffff_ffff).unwrap_or(0)
}
