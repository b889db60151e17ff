use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// Sums what is written to its eventfd and tells of each sum.
struct Sum {
    event: EventFd,
    total: u64,
    told: Sender<(u64, Option<String>)>,
}

impl MutEventSubscriber for Sum {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.total += self.event.read().unwrap();
        let thread = thread::current().name().map(String::from);
        let _ = self.told.send((self.total, thread));
    }
    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
    }
}

type Told = Receiver<(u64, Option<String>)>;

fn sum() -> (Sum, EventFd, Told) {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let handle = event.try_clone().unwrap();
    let (told, hear) = channel();
    let total = 0;
    (Sum { event, total, told }, handle, hear)
}

fn hear(told: &Told) -> u64 {
    told.recv_timeout(Duration::from_secs(10)).unwrap().0
}

#[test]
fn a_worker_is_called_in_the_thread_and_comes_back_as_it_was() {
    let io = IoThread::spawn("io-name", || Ok(())).unwrap();
    let (worker, event, told) = sum();
    let attached = io.handle().attach(worker).unwrap();
    event.write(5).unwrap();
    let (total, thread) = told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!((total, thread.as_deref()), (5, Some("io-name")));
    assert_eq!(attached.with(|w| w.total).unwrap(), 5);
    let worker = attached.detach().unwrap();
    assert_eq!(worker.total, 5);
    event.write(7).unwrap();
    assert!(told.recv_timeout(Duration::from_millis(30)).is_err());
    let again = io.handle().attach(worker).unwrap();
    assert_eq!(hear(&told), 12, "what came meanwhile was not lost");
    drop(again);
    event.write(1).unwrap();
    assert!(told.recv_timeout(Duration::from_millis(30)).is_err());
}

#[test]
fn what_runs_first_runs_in_the_thread_and_may_refuse() {
    let (tx, rx) = channel();
    let io = IoThread::spawn("io-first", move || {
        tx.send(thread::current().name().map(String::from)).unwrap();
        Ok(())
    })
    .unwrap();
    assert_eq!(rx.recv().unwrap().as_deref(), Some("io-first"));
    drop(io);
    let refused = IoThread::spawn("io-no", || Err(io::Error::other("no filter")));
    assert!(matches!(refused, Err(SpawnError::First { .. })));
}

#[test]
fn the_end_of_the_thread_is_an_error_to_its_clients_and_no_hang() {
    let io = IoThread::spawn("io-end", || Ok(())).unwrap();
    let handle = io.handle();
    let (worker, _event, told) = sum();
    let attached = handle.attach(worker).unwrap();
    drop(io);
    assert!(told.recv().is_err(), "the worker went with the thread");
    assert!(matches!(
        attached.with(|_| ()),
        Err(DetachError::Ended { .. })
    ));
    assert!(matches!(attached.detach(), Err(DetachError::Ended { .. })));
    let (worker, _event, _told) = sum();
    assert!(matches!(
        handle.attach(worker),
        Err(AttachError::Ended { .. })
    ));
}

#[test]
fn a_thread_does_not_wait_for_itself() {
    struct Nested(IoHandle, EventFd, Sender<bool>);
    impl MutEventSubscriber for Nested {
        fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
            self.1.read().unwrap();
            let (worker, _event, _told) = sum();
            let refused = matches!(self.0.attach(worker), Err(AttachError::SelfCall { .. }));
            self.2.send(refused).unwrap();
        }
        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&self.1, EventSet::IN)).unwrap();
        }
    }
    let io = IoThread::spawn("io-self", || Ok(())).unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    event.write(1).unwrap();
    let (tx, rx) = channel();
    let _attached = io.handle().attach(Nested(io.handle(), event, tx)).unwrap();
    assert!(rx.recv_timeout(Duration::from_secs(10)).unwrap());
}

#[test]
fn many_come_and_go_while_others_work() {
    let io = IoThread::spawn("io-many", || Ok(())).unwrap();
    let (worker, event, told) = sum();
    let steady = io.handle().attach(worker).unwrap();
    let churn = {
        let handle = io.handle();
        thread::spawn(move || {
            for _ in 0..500 {
                let (worker, event, _told) = sum();
                event.write(1).unwrap();
                let attached = handle.attach(worker).unwrap();
                assert!(attached.detach().unwrap().total <= 1);
            }
        })
    };
    for n in 1..=500 {
        event.write(1).unwrap();
        assert_eq!(hear(&told), n);
    }
    churn.join().unwrap();
    assert_eq!(steady.detach().unwrap().total, 500);
}
