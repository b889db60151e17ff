use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::driver::{
    Areas, BUFFERS, Desc, NEXT, WRITE, get_u16, offer, put_u16, ram, used_from, write_desc,
};
use crate::features;
use crate::signal::Interrupts;

#[derive(Default)]
struct Count(AtomicUsize);

impl Interrupts for Count {
    fn queue(&self, _index: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn config(&self) {}
    fn queue_event(&self, _index: u16) -> Option<&EventFd> {
        None
    }
}

struct Bench {
    ram: RamView,
    areas: Areas,
    queue: VirtQueue,
    fired: Arc<Count>,
}

impl Bench {
    fn new(size: u16, negotiated: u64) -> Self {
        let ram = ram();
        let areas = Areas::of(0, size);
        let registers = QueueRegisters {
            size,
            enabled: true,
            descriptors: areas.desc,
            driver: areas.avail,
            device: areas.used,
            ..QueueRegisters::new(256)
        };
        let checked = CheckedQueue::check(0, &registers, negotiated, &ram).unwrap();
        let fired = Arc::new(Count::default());
        let interrupt = QueueInterrupt::new(fired.clone(), 0);
        let queue = VirtQueue::new(checked, interrupt, Arc::default());
        Self {
            ram,
            areas,
            queue,
            fired,
        }
    }

    fn offer(&self, head: u16) {
        let desc = Desc::new(BUFFERS + u64::from(head) * 64, 64, WRITE, 0);
        write_desc(&self.ram, self.areas.desc, head, desc);
        offer(&self.ram, &self.areas, head);
    }

    fn pop(&mut self) -> Chain {
        self.queue.pop(&self.ram).unwrap().unwrap()
    }

    fn push(&mut self, chain: Chain, written: u32) {
        self.queue.push(&self.ram, chain, written).unwrap();
    }

    fn fired(&self) -> usize {
        self.fired.0.load(Ordering::SeqCst)
    }
}

/// CVE-2016-5403: a driver that makes the same chains available again and again.
#[test]
fn no_more_chains_are_in_flight_than_the_queue_has_descriptors() {
    let mut bench = Bench::new(4, 0);
    let mut held = Vec::new();
    for head in 0..4 {
        bench.offer(head);
        held.push(bench.pop());
    }
    assert_eq!(bench.queue.in_flight(), 4);
    assert!(bench.queue.pop(&bench.ram).unwrap().is_none());
    bench.offer(0);
    let err = bench.queue.pop(&bench.ram).unwrap_err();
    assert!(matches!(err, QueueFault::InFlight { size: 4 }));
    assert_eq!(bench.queue.in_flight(), 4);
}

#[test]
fn a_head_that_names_no_descriptor_is_a_fault() {
    let mut bench = Bench::new(4, 0);
    offer(&bench.ram, &bench.areas, 4);
    let err = bench.queue.pop(&bench.ram).unwrap_err();
    assert!(matches!(err, QueueFault::Head { head: 4, size: 4 }));
}

/// CVE-2024-3446 and its like: a device that reads or writes a buffer in its own registers, and so
/// comes to be called while it is at work. Registers are not guest RAM, wherever the driver puts them.
#[test]
fn buffers_in_registers_are_refused() {
    let mut bench = Bench::new(4, 0);
    let end = crate::driver::RAM_SIZE as u64;
    let places = [0x8000_0000, 0xfee0_0000, 0xe000_0000, end, end - 32];
    for (head, address) in (0_u16..).zip(places) {
        for flags in [0, WRITE] {
            let desc = Desc::new(address, 64, flags, 0);
            write_desc(&bench.ram, bench.areas.desc, head % 4, desc);
            offer(&bench.ram, &bench.areas, head % 4);
            assert!(bench.queue.pop(&bench.ram).unwrap().is_none());
        }
    }
    let counted = bench.queue.counters().malformed.load(Ordering::Relaxed);
    assert_eq!(counted, 10);
    let used = used_from(&bench.ram, &bench.areas, 8);
    assert!(used.iter().all(|(_, len)| *len == 0), "{used:?}");
}

#[test]
fn a_stock_of_chains_goes_back_in_order() {
    let mut bench = Bench::new(4, 0);
    for head in [3, 1, 2] {
        bench.offer(head);
    }
    let first = bench.pop();
    let stock = [bench.pop(), bench.pop()];
    for chain in stock.into_iter().rev() {
        bench.queue.put_back(chain);
    }
    assert_eq!(bench.queue.in_flight(), 1);
    bench.push(first, 1);
    let again = [bench.pop(), bench.pop()];
    for chain in again {
        bench.push(chain, 2);
    }
    let used = used_from(&bench.ram, &bench.areas, 0);
    assert_eq!(used, [(3, 1), (1, 2), (2, 2)]);
}

/// The mark of EVENT_IDX lies on the first of three chains that are returned at once.
#[test]
fn several_chains_are_returned_at_once() {
    for (negotiated, mark, fires) in [
        (features::COMMON, 0, 1),
        (features::COMMON, 2, 1),
        (features::COMMON, 3, 0),
        (0, 0, 1),
    ] {
        let mut bench = Bench::new(4, negotiated);
        put_u16(&bench.ram, bench.areas.avail + 4 + 4 * 2, mark);
        for head in [2, 0, 1] {
            bench.offer(head);
        }
        let chains = [bench.pop(), bench.pop(), bench.pop()];
        let filled = chains.into_iter().zip([64, 64, 9]);
        bench.queue.push_all(&bench.ram, filled).unwrap();
        let used = used_from(&bench.ram, &bench.areas, 0);
        assert_eq!(used, [(2, 64), (0, 64), (1, 9)]);
        assert_eq!(bench.queue.in_flight(), 0);
        assert_eq!(bench.queue.positions(), (3, 3));
        bench.queue.notify(&bench.ram).unwrap();
        assert_eq!(bench.fired(), fires, "{negotiated:#x}, mark {mark}");
    }
}

/// A data path in the kernel used two chains while this process looked away.
#[test]
fn a_queue_goes_on_where_another_data_path_stopped() {
    let mut bench = Bench::new(4, 0);
    let areas = bench.queue.areas();
    assert_eq!(areas.descriptors, (GuestAddress(bench.areas.desc), 64));
    assert_eq!(areas.driver, (GuestAddress(bench.areas.avail), 14));
    assert_eq!(areas.device, (GuestAddress(bench.areas.used), 38));
    for head in 0..3 {
        bench.offer(head);
    }
    put_u16(&bench.ram, bench.areas.used + 2, 2);
    bench.queue.continue_at(&bench.ram, 2).unwrap();
    assert_eq!(bench.queue.positions(), (2, 2));
    let chain = bench.pop();
    bench.push(chain, 7);
    assert_eq!(used_from(&bench.ram, &bench.areas, 2), [(2, 7)]);
}

#[test]
fn chains_may_return_out_of_order_and_lengths_are_clamped() {
    let mut bench = Bench::new(4, 0);
    bench.offer(2);
    bench.offer(1);
    let (a, b) = (bench.pop(), bench.pop());
    bench.push(b, 5);
    bench.push(a, u32::MAX);
    assert_eq!(used_from(&bench.ram, &bench.areas, 0), [(1, 5), (2, 64)]);
    assert_eq!(bench.queue.in_flight(), 0);
    assert_eq!(bench.queue.positions(), (2, 2));
}

#[test]
fn an_undone_pop_comes_again() {
    let mut bench = Bench::new(4, 0);
    bench.offer(3);
    let chain = bench.pop();
    bench.queue.undo_pop(chain);
    assert_eq!(bench.queue.in_flight(), 0);
    let chain = bench.pop();
    bench.push(chain, 1);
    assert_eq!(used_from(&bench.ram, &bench.areas, 0), [(3, 1)]);
}

#[test]
fn one_interrupt_a_batch_and_none_for_nothing() {
    let mut bench = Bench::new(8, 0);
    bench.queue.notify(&bench.ram).unwrap();
    assert_eq!(bench.fired(), 0);
    for head in 0..3 {
        bench.offer(head);
    }
    for _ in 0..3 {
        let chain = bench.pop();
        bench.push(chain, 1);
    }
    bench.queue.notify(&bench.ram).unwrap();
    bench.queue.notify(&bench.ram).unwrap();
    assert_eq!(bench.fired(), 1);
}

#[test]
fn the_no_interrupt_flag_counts_without_event_idx() {
    let mut bench = Bench::new(8, 0);
    put_u16(&bench.ram, bench.areas.avail, 1);
    bench.offer(0);
    let chain = bench.pop();
    bench.push(chain, 1);
    bench.queue.notify(&bench.ram).unwrap();
    assert_eq!(bench.fired(), 0);
    assert_eq!(bench.queue.counters().suppressed.load(Ordering::Relaxed), 1);
}

#[test]
fn event_idx_decides_with_event_idx() {
    let mut bench = Bench::new(8, features::EVENT_IDX);
    let used_event = bench.areas.avail + 4 + 8 * 2;
    put_u16(&bench.ram, used_event, 1);
    // The flag means nothing here.
    put_u16(&bench.ram, bench.areas.avail, 1);
    for (head, fired) in [(0, 0), (1, 1), (2, 1)] {
        bench.offer(head);
        let chain = bench.pop();
        bench.push(chain, 1);
        bench.queue.notify(&bench.ram).unwrap();
        assert_eq!(bench.fired(), fired);
    }
}

#[test]
fn kicks_are_paused_and_resumed_by_flag_and_by_index() {
    let mut bench = Bench::new(8, 0);
    bench.queue.pause_kicks(&bench.ram).unwrap();
    assert_eq!(get_u16(&bench.ram, bench.areas.used), 1);
    assert!(!bench.queue.resume_kicks(&bench.ram).unwrap());
    assert_eq!(get_u16(&bench.ram, bench.areas.used), 0);

    let mut bench = Bench::new(8, features::EVENT_IDX);
    bench.offer(0);
    let chain = bench.pop();
    bench.push(chain, 0);
    assert!(!bench.queue.resume_kicks(&bench.ram).unwrap());
    let avail_event = bench.areas.used + 4 + 8 * 8;
    assert_eq!(get_u16(&bench.ram, avail_event), 1);
    bench.offer(0);
    assert!(bench.queue.resume_kicks(&bench.ram).unwrap(), "one came");
}

#[test]
fn a_postponed_kick_comes_with_the_chain_it_was_asked_for() {
    let mut bench = Bench::new(8, features::EVENT_IDX);
    bench.offer(0);
    let chain = bench.pop();
    bench.push(chain, 0);
    assert!(bench.queue.can_postpone_kicks());
    assert!(!bench.queue.postpone_kicks(&bench.ram, 4).unwrap());
    // avail_event closes the used ring: the driver kicks when its index goes past 4.
    assert_eq!(get_u16(&bench.ram, bench.areas.used + 4 + 8 * 8), 4);
    for head in 1..4 {
        bench.offer(head);
        assert!(!bench.queue.postpone_kicks(&bench.ram, 4).unwrap());
    }
    bench.offer(4);
    assert!(bench.queue.postpone_kicks(&bench.ram, 4).unwrap());
    assert!(!Bench::new(8, 0).queue.can_postpone_kicks());
}

#[test]
fn indices_wrap() {
    let mut bench = Bench::new(2, features::EVENT_IDX);
    for _ in 0..0x1_0010_u32 {
        bench.offer(1);
        let chain = bench.pop();
        bench.push(chain, 7);
    }
    assert_eq!(bench.queue.positions(), (0x10, 0x10));
    assert_eq!(get_u16(&bench.ram, bench.areas.used + 2), 0x10);
}

#[test]
fn slices_cover_the_chain() {
    let mut bench = Bench::new(4, 0);
    let parts = [(0, 3, NEXT), (10, 5, NEXT | WRITE), (20, 7, WRITE)];
    for (index, (at, len, flags)) in (0..).zip(parts) {
        let desc = Desc::new(BUFFERS + at, len, flags, index + 1);
        write_desc(&bench.ram, bench.areas.desc, index, desc);
    }
    offer(&bench.ram, &bench.areas, 0);
    let chain = bench.pop();
    let lens = |slices: Vec<vm_memory::VolatileSlice<'_>>| -> Vec<usize> {
        slices.iter().map(vm_memory::VolatileSlice::len).collect()
    };
    assert_eq!(lens(chain.readable_slices(&bench.ram).unwrap()), [3]);
    assert_eq!(lens(chain.writable_slices(&bench.ram).unwrap()), [5, 7]);
    let gone = RamView::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    assert!(chain.writable_slices(&gone).is_err());
    assert!(chain.write(&gone, 0, &[1]).is_err());
    assert!(chain.read(&gone, 0, &mut [1]).is_err());
}

proptest! {
    /// Reads and writes at any offset are reads and writes of the concatenated buffers.
    #[test]
    fn chains_read_and_write_as_one_piece(
        lens in prop::collection::vec(0_u32..50, 1..6),
        offset in 0_u32..300,
        data in prop::collection::vec(any::<u8>(), 0..300),
        writable in any::<bool>(),
    ) {
        let mut bench = Bench::new(8, 0);
        let last = lens.len() - 1;
        let mut cells = Vec::new();
        for (index, len) in (0_u16..).zip(&lens) {
            let at = BUFFERS + u64::from(index) * 0x100;
            let mut flags = if usize::from(index) < last { NEXT } else { 0 };
            flags |= if writable { WRITE } else { 0 };
            write_desc(&bench.ram, bench.areas.desc, index, Desc::new(at, *len, flags, index + 1));
            cells.extend((0..u64::from(*len)).map(|n| at + n));
        }
        for (n, at) in (0_u32..).zip(&cells) {
            bench.ram.write_obj(n.to_le_bytes()[0], GuestAddress(*at)).unwrap();
        }
        offer(&bench.ram, &bench.areas, 0);
        let chain = bench.pop();
        let start = usize::try_from(offset).unwrap().min(cells.len());
        let expected = data.len().min(cells.len() - start);
        if writable {
            prop_assert_eq!(chain.write(&bench.ram, offset, &data).unwrap(), expected);
            for (at, byte) in cells[start..start + expected].iter().zip(&data) {
                prop_assert_eq!(bench.ram.read_obj::<u8>(GuestAddress(*at)).unwrap(), *byte);
            }
        } else {
            let mut seen = vec![0; data.len()];
            prop_assert_eq!(chain.read(&bench.ram, offset, &mut seen).unwrap(), expected);
            for (n, byte) in (offset..).zip(&seen[..expected]) {
                prop_assert_eq!(*byte, n.to_le_bytes()[0]);
            }
        }
        bench.push(chain, 0);
    }

    /// Any bytes as descriptors and rings: bounded work, no panic, and every chain taken is inside
    /// guest RAM.
    #[test]
    fn any_rings_are_survived(
        table in prop::collection::vec((0_u64..0x14_0000, 0_u32..0x2000, 0_u16..8, 0_u16..10), 8),
        heads in prop::collection::vec(0_u16..10, 0..8),
        negotiated in prop_oneof![Just(0), Just(features::COMMON)],
    ) {
        let mut bench = Bench::new(8, negotiated);
        for (index, (addr, len, flags, next)) in (0..).zip(table) {
            write_desc(&bench.ram, bench.areas.desc, index, Desc::new(addr, len, flags, next));
        }
        for head in heads {
            offer(&bench.ram, &bench.areas, head);
        }
        for _ in 0..16 {
            match bench.queue.pop(&bench.ram) {
                Ok(Some(chain)) => {
                    let total: u64 = chain.writable().iter().map(|b| u64::from(b.len)).sum();
                    prop_assert_eq!(total, u64::from(chain.writable_len()));
                    prop_assert!(chain.readable_slices(&bench.ram).is_ok());
                    prop_assert!(chain.writable_slices(&bench.ram).is_ok());
                    if bench.queue.push(&bench.ram, chain, 1).is_err() {
                        break;
                    }
                }
                Ok(None) | Err(_) => break,
            }
        }
    }
}

/// Puts `id` into the used ring, as a data path elsewhere does.
fn use_elsewhere(bench: &Bench, id: u16) {
    let index = get_u16(&bench.ram, bench.areas.used + 2);
    let slot = bench.areas.used + 4 + u64::from(index % bench.areas.size) * 8;
    bench
        .ram
        .write_obj(u32::from(id), GuestAddress(slot))
        .unwrap();
    put_u16(&bench.ram, bench.areas.used + 2, index.wrapping_add(1));
}

#[test]
fn chains_lost_out_of_order_are_not_guessed_at() {
    let mut bench = Bench::new(8, 0);
    for head in 0..4 {
        bench.offer(head);
    }
    use_elsewhere(&bench, 2);
    let err = bench.queue.reclaim(&bench.ram).unwrap_err();
    assert!(matches!(err, QueueFault::Unordered { held: 3 }), "{err}");
    bench.offer(5);
    let chain = bench.pop();
    bench.push(chain, 0);
    assert_eq!(
        used_from(&bench.ram, &bench.areas, 1),
        [(5, 0)],
        "it goes on"
    );
}

#[test]
fn rings_that_contradict_each_other_cannot_be_taken_back() {
    let mut bench = Bench::new(4, 0);
    put_u16(&bench.ram, bench.areas.used + 2, 9);
    let err = bench.queue.reclaim(&bench.ram).unwrap_err();
    assert!(matches!(err, QueueFault::InFlight { size: 4 }), "{err}");
}

proptest! {
    /// What a data path that returns chains in order held is available again, wherever the indices
    /// are; nothing else is.
    #[test]
    fn exactly_what_was_held_is_taken_back(
        start in any::<u16>(),
        moves in prop::collection::vec(any::<bool>(), 0..100),
    ) {
        let mut bench = Bench::new(8, 0);
        for at in [bench.areas.avail + 2, bench.areas.used + 2] {
            put_u16(&bench.ram, at, start);
        }
        let mut free: Vec<u16> = (0..8).rev().collect();
        let mut held = Vec::new();
        for offer in moves {
            if offer && let Some(head) = free.pop() {
                bench.offer(head);
                held.push(head);
            } else if !held.is_empty() {
                let head = held.remove(0);
                use_elsewhere(&bench, head);
                free.insert(0, head);
            }
        }
        bench.queue.reclaim(&bench.ram).unwrap();
        let from = get_u16(&bench.ram, bench.areas.used + 2);
        while let Some(chain) = bench.queue.pop(&bench.ram).unwrap() {
            bench.push(chain, 0);
        }
        let back = used_from(&bench.ram, &bench.areas, from);
        let heads: Vec<u16> = back.iter().map(|(id, _)| u16::try_from(*id).unwrap()).collect();
        prop_assert_eq!(heads, held);
    }
}

#[derive(Debug, Clone, Copy)]
enum Work {
    Offer,
    Pop,
    /// One of those in flight, wherever it is among them.
    Push(prop::sample::Index),
    /// The last that was popped, if it is still in flight.
    Undo,
}

fn work() -> impl Strategy<Value = Work> {
    prop_oneof![
        3 => Just(Work::Offer),
        3 => Just(Work::Pop),
        2 => any::<prop::sample::Index>().prop_map(Work::Push),
        1 => Just(Work::Undo),
    ]
}

proptest! {
    /// In whatever order chains are offered, popped, put back and returned, and wherever the indices
    /// are when they wrap: chains come in the order offered, each once, and the used ring has them in
    /// the order returned.
    #[test]
    fn index_arithmetic_keeps_the_books(
        start in prop_oneof![any::<u16>(), 0xfff0_u16..=0xffff],
        steps in prop::collection::vec(work(), 0..200),
    ) {
        let mut bench = Bench::new(8, features::EVENT_IDX);
        for at in [bench.areas.avail + 2, bench.areas.used + 2] {
            put_u16(&bench.ram, at, start);
        }
        bench.queue.continue_at(&bench.ram, start).unwrap();
        let mut free: std::collections::VecDeque<u16> = (0..8).collect();
        let mut offered = std::collections::VecDeque::new();
        let mut flying: Vec<(u16, Chain)> = Vec::new();
        let (mut last, mut taken, mut returned) = (None, 0_u16, Vec::new());
        for step in steps {
            match step {
                Work::Offer => {
                    if let Some(head) = free.pop_front() {
                        bench.offer(head);
                        offered.push_back(head);
                    }
                }
                Work::Pop => {
                    let chain = bench.queue.pop(&bench.ram).unwrap();
                    prop_assert_eq!(chain.is_some(), !offered.is_empty());
                    if let (Some(chain), Some(head)) = (chain, offered.pop_front()) {
                        let address = BUFFERS + u64::from(head) * 64;
                        prop_assert_eq!(chain.writable()[0].address.0, address);
                        flying.push((head, chain));
                        (last, taken) = (Some(head), taken.wrapping_add(1));
                    }
                }
                Work::Push(which) => {
                    if !flying.is_empty() {
                        let (head, chain) = flying.remove(which.index(flying.len()));
                        last = last.filter(|last| *last != head);
                        bench.push(chain, head.into());
                        returned.push((u32::from(head), u32::from(head)));
                        free.push_back(head);
                    }
                }
                Work::Undo => {
                    if let Some(head) = last.take() {
                        let (_, chain) = flying.pop().unwrap();
                        bench.queue.undo_pop(chain);
                        offered.push_front(head);
                        taken = taken.wrapping_sub(1);
                    }
                }
            }
            let used = u16::try_from(returned.len()).unwrap();
            let positions = (start.wrapping_add(taken), start.wrapping_add(used));
            prop_assert_eq!(bench.queue.positions(), positions);
            prop_assert_eq!(usize::from(bench.queue.in_flight()), flying.len());
        }
        let from = returned.len().saturating_sub(8);
        let ring = used_from(&bench.ram, &bench.areas, start.wrapping_add(u16::try_from(from).unwrap()));
        prop_assert_eq!(&ring, &returned[from..]);
    }
}
