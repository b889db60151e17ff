//! The console's events on the `io` thread.

use std::io::{self, Read};
use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{Console, Input, Watch};

const STALLED: u32 = 0;
const OUTPUT: u32 = 1;
const ROOM: u32 = 2;
const INPUT: u32 = 3;
const LISTENER: u32 = 4;

/// Input read at a time; what the guest's FIFO does not take waits, and nothing more is read.
const CHUNK: usize = 4096;

impl Console {
    fn tell_connected(&self, connected: bool) {
        if let Some(line) = &self.line {
            line.set_connected(connected);
        }
    }

    /// Gives the guest what waits; `true` when nothing waits any more.
    fn offer(&mut self) -> bool {
        let taken = self.line.as_ref().map_or(0, |s| s.offer(&self.pending));
        self.pending.drain(..taken.min(self.pending.len()));
        self.pending.is_empty()
    }

    /// Watches the input while the guest takes what there is, and not otherwise: what is not read
    /// waits with its writer.
    fn watch_input(&mut self, ops: &mut EventOps<'_>, wanted: bool) {
        let Some(fd) = self.input_fd() else { return };
        let events = Events::with_data_raw(fd, INPUT, EventSet::IN);
        self.watch = match (self.watch, wanted) {
            (Watch::Yes, false) => {
                let _ = ops.remove(events);
                Watch::No
            }
            (Watch::No, true) if ops.add(events).is_ok() => Watch::Yes,
            (Watch::No, true) => Watch::Impossible,
            (unchanged, _) => unchanged,
        };
    }

    /// Reads a chunk; `false` at the end of the input.
    fn read_input(&mut self) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        let got = match &self.input {
            Input::None => 0,
            Input::File(stdin) => (&*stdin).read(&mut chunk)?,
            Input::Unix(listening) => listening.read(&mut chunk)?,
        };
        let typed = chunk.get(..got).unwrap_or_default();
        if self.terminal.is_some() {
            let (through, end) = self.escape.filter(typed);
            self.pending.extend(through);
            if end {
                (self.end_requested)();
            }
        } else {
            self.pending.extend_from_slice(typed);
        }
        Ok(got > 0)
    }

    fn input_ready(&mut self, ops: &mut EventOps<'_>) {
        let fd = self.input_fd();
        loop {
            match self.read_input() {
                Ok(true) => {
                    let taken = self.offer();
                    self.watch_input(ops, taken);
                    if taken && self.watch == Watch::Impossible {
                        continue;
                    }
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Ok(false) | Err(_) => self.input_ended(fd, ops),
            }
            return;
        }
    }

    fn input_ended(&mut self, fd: Option<RawFd>, ops: &mut EventOps<'_>) {
        if let Some(fd) = fd
            && self.watch == Watch::Yes
        {
            let _ = ops.remove(Events::with_data_raw(fd, INPUT, EventSet::IN));
        }
        self.watch = Watch::No;
        match &self.input {
            Input::File(_) => self.input = Input::None,
            Input::Unix(unix) => {
                unix.hang_up();
                self.tell_connected(false);
            }
            Input::None => {}
        }
    }

    fn output_stalled(&mut self, ops: &mut EventOps<'_>) {
        let Some(line) = &self.line else { return };
        if !line.output_waiting() {
            return;
        }
        let armed = self.output_fd().is_some_and(|fd| {
            let events = Events::with_data_raw(fd, OUTPUT, EventSet::OUT | EventSet::ONE_SHOT);
            ops.modify(events).is_ok() || ops.add(events).is_ok()
        });
        if !armed {
            // Nothing to wait for: the client is gone.
            line.output_ready();
        }
    }

    fn client_waits(&mut self, ops: &mut EventOps<'_>) {
        if matches!(&self.input, Input::Unix(unix) if unix.client_is_gone()) {
            self.input_ended(self.input_fd(), ops);
        }
        let Input::Unix(listening) = &self.input else {
            return;
        };
        if matches!(listening.accept(), Ok(true)) {
            // What the last client sent and the guest did not take goes with that client.
            self.pending.clear();
            self.tell_connected(true);
            self.watch = Watch::No;
            self.watch_input(ops, true);
            if let Some(line) = &self.line {
                line.output_ready();
            }
        }
    }

    fn room(&mut self, ops: &mut EventOps<'_>) {
        if let Some(line) = &self.line {
            let _ = line.room().read();
        }
        if self.offer() {
            self.watch_input(ops, true);
            if self.watch == Watch::Impossible {
                self.input_ready(ops);
            }
        }
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut fds = vec![Events::with_data(&*self.stalled, STALLED, EventSet::IN)];
        if let Some(line) = &self.line {
            fds.push(Events::with_data(line.room(), ROOM, EventSet::IN));
        }
        if let Input::Unix(listening) = &self.input {
            let fd = listening.listener_fd();
            fds.push(Events::with_data_raw(fd, LISTENER, EventSet::IN));
        }
        for events in fds {
            if let Err(error) = ops.add(events) {
                log::error!("the console does not work: {error:?}");
            }
        }
        self.room(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            STALLED => {
                let _ = self.stalled.read();
                self.output_stalled(ops);
            }
            OUTPUT => {
                if let Some(line) = &self.line {
                    line.output_ready();
                }
                self.output_stalled(ops);
            }
            ROOM => self.room(ops),
            INPUT => self.input_ready(ops),
            LISTENER => self.client_waits(ops),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use virtio_devices::IoThread;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;
    use vmm_sys_util::eventfd::EventFd;

    use super::super::line::Line;
    use super::*;
    use crate::spec::ConsoleConfig;

    /// A guest that takes everything.
    struct Taker {
        heard: Arc<Mutex<Vec<u8>>>,
        connected: Arc<Mutex<Vec<bool>>>,
        room: EventFd,
    }

    impl Line for Taker {
        fn offer(&self, input: &[u8]) -> usize {
            self.heard.lock().unwrap().extend(input);
            input.len()
        }
        fn room(&self) -> &EventFd {
            &self.room
        }
        fn output_ready(&self) -> bool {
            true
        }
        fn output_waiting(&self) -> bool {
            false
        }
        fn lost(&self) -> u64 {
            0
        }
        fn set_connected(&self, connected: bool) {
            self.connected.lock().unwrap().push(connected);
        }
    }

    fn wait(what: &str, mut done: impl FnMut() -> bool) {
        let limit = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < limit, "no {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The next client's descriptor has the number of the one before.
    #[test]
    fn clients_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let config = ConsoleConfig::Unix(path.clone());
        let mut console = Console::open(&config, Box::new(|| {})).unwrap();
        let (heard, connected) = (Arc::default(), Arc::default());
        console.connect(Taker {
            heard: Arc::clone(&heard),
            connected: Arc::clone(&connected),
            room: EventFd::new(EFD_NONBLOCK).unwrap(),
        });
        let mut sink = console.sink().unwrap();
        let io = IoThread::spawn("io", || Ok(())).unwrap();
        let _events = io.handle().attach(Arc::new(Mutex::new(console))).unwrap();
        for round in 1..5 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"x").unwrap();
            wait("input", || heard.lock().unwrap().len() == round);
            drop(client);
            if round == 3 {
                // The writer may be the first to notice.
                wait("end", || sink.write(b"y").is_ok());
            }
            wait("end", || connected.lock().unwrap().len() == 1 + 2 * round);
        }
        let expected = [false, true, false, true, false, true, false, true, false];
        assert_eq!(*connected.lock().unwrap(), expected);
    }
}
