//! Tiny real-mode guests against the host's KVM. On a host without it each test says Skipped.
#![cfg(target_arch = "x86_64")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    unsafe_code,
    reason = "tests fail by panicking; a memslot of the test's own RAM"
)]

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use testudo_bus::{
    Access, Bus, Device, DoorbellAddress, Doorbells, IrqError, Mapping, Msi, MsiMessage, Range,
    Slot,
};
use testudo_kvm::{
    Exit, Hypervisor, Interrupts, KvmDoorbells, Memslots, RunError, Vcpu, Vm, install_kick_handler,
};
use testudo_memory::{Backing, GuestRam};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const CODE: u64 = 0x1000;

/// What a device saw: offset and bytes of each write.
type Seen = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

struct Recorder(Seen);

impl Device for Recorder {
    fn read(&mut self, at: Access, data: &mut [u8]) {
        data.fill(0x40 + u8::try_from(at.offset).unwrap());
    }
    fn write(&mut self, at: Access, data: &[u8]) {
        self.0.lock().unwrap().push((at.offset, data.to_vec()));
    }
}

struct Machine {
    vm: Vm,
    ram: GuestRam,
    pio: Bus,
    mmio: Bus,
    seen: Seen,
    _held: Vec<Mapping>,
}

fn machine(test: &str, interrupt_controllers: bool) -> Option<Machine> {
    let hypervisor = match Hypervisor::open(Path::new("/dev/kvm")) {
        Ok(hypervisor) => hypervisor,
        Err(why) => {
            println!("SKIP {test}: {why}");
            return None;
        }
    };
    install_kick_handler().unwrap();
    let vm = hypervisor.create_vm().unwrap();
    if interrupt_controllers {
        vm.fd().create_irq_chip().unwrap();
    }
    let mut ram = GuestRam::new();
    ram.listen(Memslots::new(&vm).unwrap().listener()).unwrap();
    ram.add(0, 2 << 20, &Backing::default()).unwrap();
    let (pio, mmio) = (Bus::new("pio"), Bus::new("mmio"));
    let seen = Seen::default();
    let recorder = || {
        Arc::new(Slot::<dyn Device>::new(Box::new(Recorder(Arc::clone(
            &seen,
        )))))
    };
    let held = vec![pio.map(Range::new(0x3f8, 8).unwrap(), recorder()).unwrap()];
    Some(Machine {
        vm,
        ram,
        pio,
        mmio,
        seen,
        _held: held,
    })
}

impl Machine {
    fn vcpu(&self, code: &[u8]) -> Vcpu {
        self.ram
            .view()
            .write_slice(code, GuestAddress(CODE))
            .unwrap();
        let vcpu = self.vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.fd().get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.fd().set_sregs(&sregs).unwrap();
        let mut regs = vcpu.fd().get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.fd().set_regs(&regs).unwrap();
        vcpu
    }

    /// Runs to the `hlt`, which without interrupt controllers is an exit.
    fn run_to_halt(&self, vcpu: &mut Vcpu) {
        loop {
            match vcpu.run(&self.pio, &self.mmio) {
                Ok(Exit::Handled) => {}
                Err(RunError::Unexpected(what)) if what == "Hlt" => return,
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn port_accesses_reach_the_bus_item_by_item() {
    let Some(machine) = machine("port_accesses", false) else {
        return;
    };
    machine
        .ram
        .view()
        .write_slice(b"xyz", GuestAddress(0x2000))
        .unwrap();
    let mut vcpu = machine.vcpu(&[
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'A', 0xee, // mov al, 'A'; out dx, al
        0xbe, 0x00, 0x20, // mov si, 0x2000
        0xb9, 0x03, 0x00, // mov cx, 3
        0xfc, 0xf3, 0x6e, // cld; rep outsb
        0xba, 0xfa, 0x03, // mov dx, 0x3fa
        0xec, 0xee, // in al, dx; out dx, al
        0xb8, 0x34, 0x12, 0xef, // mov ax, 0x1234; out dx, ax
        0xf4, // hlt
    ]);
    machine.run_to_halt(&mut vcpu);
    let seen = machine.seen.lock().unwrap();
    let bytes: Vec<_> = seen.iter().map(|(at, d)| (*at, d.as_slice())).collect();
    assert_eq!(
        bytes,
        [
            (0, &b"A"[..]),
            (0, b"x"),
            (0, b"y"),
            (0, b"z"),
            (2, &[0x42]),
            (2, &[0x34, 0x12])
        ]
    );
}

#[test]
fn a_doorbell_rings_without_an_exit_until_it_is_dropped() {
    let Some(machine) = machine("a_doorbell", false) else {
        return;
    };
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let doorbells = KvmDoorbells::new(&machine.vm);
    let bell = doorbells.bind(DoorbellAddress::Pio(0x3f9), &event).unwrap();
    let code = [0xba, 0xf9, 0x03, 0xee, 0xef, 0xf4]; // mov dx; out dx, al; out dx, ax; hlt
    let mut vcpu = machine.vcpu(&code);
    machine.run_to_halt(&mut vcpu);
    assert_eq!(event.read().unwrap(), 2, "any width rings");
    assert!(machine.seen.lock().unwrap().is_empty());
    drop(bell);
    let mut regs = vcpu.fd().get_regs().unwrap();
    regs.rip = CODE;
    vcpu.fd().set_regs(&regs).unwrap();
    machine.run_to_halt(&mut vcpu);
    assert_eq!(machine.seen.lock().unwrap().len(), 2);
}

#[test]
fn a_kick_ends_a_run_and_is_not_lost_before_one() {
    let Some(machine) = machine("a_kick", false) else {
        return;
    };
    let mut vcpu = machine.vcpu(&[0xeb, 0xfe]); // jmp $
    let kick = vcpu.kick();
    let runs = Arc::new(AtomicU32::new(0));
    std::thread::scope(|scope| {
        let (pio, mmio, counted) = (&machine.pio, &machine.mmio, Arc::clone(&runs));
        let runner = scope.spawn(move || {
            vcpu.adopt_this_thread();
            // Posted before the run: must end it at once.
            vcpu.kick().kick();
            assert_eq!(vcpu.run(pio, mmio).unwrap(), Exit::Interrupted);
            counted.store(1, Ordering::SeqCst);
            vcpu.clear_kick();
            while counted.load(Ordering::SeqCst) == 1 {
                assert_eq!(vcpu.run(pio, mmio).unwrap(), Exit::Interrupted);
            }
        });
        while runs.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        // Give it time to be in the guest; either way the kick must bring it out.
        std::thread::sleep(Duration::from_millis(20));
        runs.store(2, Ordering::SeqCst);
        kick.kick();
        runner.join().unwrap();
    });
    kick.kick();
}

#[test]
fn a_write_to_read_only_memory_is_an_exit() {
    let Some(mut machine) = machine("read_only", false) else {
        return;
    };
    // The guest's code is in RAM at 0; read-only memory is in a slot of its own behind it.
    let mut rom = GuestRam::new();
    rom.add(0x8_0000, 0x1_0000, &Backing::default()).unwrap();
    let host = rom.ranges().next().unwrap().host;
    machine.ram = GuestRam::new();
    let slots = Memslots::new(&machine.vm).unwrap();
    machine.ram.listen(slots.listener()).unwrap();
    machine.ram.add(0, 0x1_0000, &Backing::default()).unwrap();
    // SAFETY: guest RAM stays mapped for the life of the process, and nothing else uses this.
    let _rom = unsafe { slots.map(0x8_0000, 0x1_0000, host, true) }.unwrap();
    rom.view()
        .write_obj(0x77_u8, GuestAddress(0x8_0010))
        .unwrap();
    let seen = Seen::default();
    let recorder: Slot<dyn Device> = Slot::new(Box::new(Recorder(Arc::clone(&seen))));
    let range = Range::new(0x8_0000, 0x1_0000).unwrap();
    let _held = machine.mmio.map(range, Arc::new(recorder)).unwrap();
    let mut vcpu = machine.vcpu(&[
        0xb8, 0x00, 0x80, 0x8e, 0xd8, // mov ax, 0x8000; mov ds, ax
        0xc6, 0x06, 0x10, 0x00, 0x55, // mov byte [0x10], 0x55
        0xa0, 0x10, 0x00, // mov al, [0x10]
        0xba, 0xf8, 0x03, 0xee, // mov dx, 0x3f8; out dx, al
        0xf4, // hlt
    ]);
    machine.run_to_halt(&mut vcpu);
    assert_eq!(
        *seen.lock().unwrap(),
        [(0x10, vec![0x55])],
        "the write came out"
    );
    assert_eq!(
        *machine.seen.lock().unwrap(),
        [(0, vec![0x77])],
        "and changed nothing"
    );
}

#[test]
fn vectors_come_from_a_pool_and_go_back() {
    let Some(machine) = machine("vectors", true) else {
        return;
    };
    let interrupts = Interrupts::new(&machine.vm).unwrap();
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x4020,
    };
    let mut all = Vec::new();
    let limit = loop {
        match interrupts.vector() {
            Ok(vector) => all.push(vector),
            Err(IrqError::Exhausted { limit }) => break limit,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(u32::try_from(all.len()).unwrap() + 24, limit);
    all.last().unwrap().enable(message).unwrap();
    all.last().unwrap().enable(message).unwrap();
    all.last().unwrap().disable();
    all.pop();
    let again = interrupts.vector().unwrap();
    again.enable(message).unwrap();
    again.eventfd().write(1).unwrap();
    let line = interrupts.line(4).unwrap();
    line.trigger();
    assert!(interrupts.line(24).is_err());
}
