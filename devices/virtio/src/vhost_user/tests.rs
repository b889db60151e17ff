use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Instant;

use proptest::prelude::*;
use testudo_memory::{Backing, GuestRam, Share};
use testudo_pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};

use super::testing::{Answer, Fake, Manners, Seen, accept, honest, spawn};
use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{Areas, BUFFERS, Desc, Driver, NEXT, WRITE, get_u16, put_u16, reg, write_desc};
use crate::{IoThread, features};

fn options(kind: VhostUserKind, queues: u16) -> VhostUserOptions {
    VhostUserOptions {
        kind,
        queues,
        queue_size: 256,
        reconnect: false,
    }
}

fn fs() -> VhostUserOptions {
    let tag = "tag".to_owned();
    options(VhostUserKind::Fs { tag }, 1)
}

fn blk() -> VhostUserOptions {
    options(VhostUserKind::Blk, 1)
}

fn net(queues: u16) -> VhostUserOptions {
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    options(VhostUserKind::Net { mac }, queues)
}

fn open(manners: Manners, options: VhostUserOptions, io: &IoHandle) -> VhostUser {
    let (socket, _) = spawn(manners);
    VhostUser::open(Backend::Socket(socket), options, io).unwrap()
}

fn refused(manners: Manners, options: VhostUserOptions) -> String {
    let io = IoThread::spawn("io-test", || Ok(())).unwrap();
    let (socket, _) = spawn(manners);
    match VhostUser::open(Backend::Socket(socket), options, &io.handle()) {
        Ok(_) => panic!("it was taken"),
        Err(VhostUserError::Peer(e)) => match e.source() {
            Some(source) => format!("{e}: {source}"),
            None => e.to_string(),
        },
        Err(e) => panic!("{e}"),
    }
}

const SUBJECT: Subject = Subject {
    make: |io| open(Manners::default(), fs(), io).model(),
    queue: 1,
    request: || (vec![7; 40], 64),
};

const NET: Subject = Subject {
    make: |io| open(Manners::default(), net(1), io).model(),
    queue: 0,
    request: || (Vec::new(), 64),
};

/// All but what a back-end does with chains and rings that are wrong, which is its own affair.
macro_rules! conforms {
    ($name:ident, $subject:expr) => {
        mod $name {
            use super::*;
            conformance!(@ $subject;
                requests_are_served_with_every_ring_feature
                indirect_tables_work
                no_kick_is_missed_under_load
                reset_and_start_again
                reset_leaves_guest_memory_alone
                kicks_before_and_after_running_do_nothing
                paused_models_serve_nothing_and_lose_nothing
                unplug_while_running
                the_thread_may_end_first
                queue_registers_are_frozen_at_driver_ok
                a_bad_queue_number_selects_nothing
                a_bad_queue_size_needs_a_reset
                only_a_one_enables_a_queue
                bad_areas_need_a_reset
                features_are_agreed_or_refused
                driver_ok_out_of_order_needs_a_reset
                every_offset_and_width_is_answered
                arbitrary_accesses_are_survived
                the_access_window_reaches_the_bar
            );
        }
    };
}

conforms!(file_systems_conform, SUBJECT);
conforms!(networks_conform, NET);

/// Puts a request of `len` readable bytes and a writable buffer on queue 1.
fn ask(driver: &mut Driver, readable: &[u8], writable: u32) {
    driver
        .ram
        .write_slice(readable, GuestAddress(BUFFERS))
        .unwrap();
    let len = u32::try_from(readable.len()).unwrap();
    let descs = [
        Desc::new(BUFFERS, len, NEXT, 1),
        Desc::new(BUFFERS + 0x1000, writable, WRITE, 0),
    ];
    driver.submit(1, &descs);
}

fn answer<const N: usize>(driver: &Driver) -> [u8; N] {
    let mut bytes = [0; N];
    driver
        .ram
        .read_slice(&mut bytes, GuestAddress(BUFFERS + 0x1000))
        .unwrap();
    bytes
}

fn gauge(driver: &Driver, name: &str) -> u64 {
    let all: BTreeMap<String, u64> = driver.function.counters().read().into_iter().collect();
    all[name]
}

#[test]
fn a_pause_ends_and_a_start_begins_where_the_rings_are() {
    let (socket, backend) = spawn(Manners::default());
    let mut driver = Driver::new(|io| {
        VhostUser::open(Backend::Socket(socket), fs(), io)
            .unwrap()
            .model()
    });
    driver.start_full();
    for _ in 0..3 {
        ask(&mut driver, &[0; 40], 64);
        assert_eq!(driver.used(1), (0, 64));
    }
    driver.function.pause();
    driver.function.resume();
    driver.set_status(0);
    drop(driver);
    let seen = backend.join().unwrap();
    assert_eq!(seen.bases, [(0, 0), (1, 0), (0, 0), (1, 3)]);
    assert_eq!(seen.enabled, [(0, false), (1, false)].into());
    assert_eq!(seen.regions, [(0, crate::driver::RAM_SIZE as u64)]);
}

#[test]
fn requests_are_refused_when_the_back_end_has_gone() {
    let hoarder = Manners {
        hoards: true,
        ..Manners::default()
    };
    let (socket, _backend) = spawn(hoarder);
    let peer = socket.try_clone().unwrap();
    let mut driver = Driver::new(|io| {
        VhostUser::open(Backend::Socket(socket), fs(), io)
            .unwrap()
            .model()
    });
    driver.start_full();
    let mut request = [0; 40];
    request[8..16].copy_from_slice(&77_u64.to_le_bytes());
    ask(&mut driver, &request, 80);
    // The back-end has taken the chain when it asks to be kicked for the next one.
    let asks_for = Areas::of(1, 16).used + 4 + 16 * 8;
    while get_u16(&driver.ram, asks_for) != 1 {
        std::thread::yield_now();
    }
    // As if it had been killed.
    rustix::net::shutdown(&peer, rustix::net::Shutdown::Both).unwrap();
    assert_eq!(driver.used(1), (0, 16), "what it held is answered");
    let expected = [
        &16_u32.to_le_bytes()[..],
        &(-107_i32).to_le_bytes(),
        &77_u64.to_le_bytes(),
    ];
    assert_eq!(answer::<16>(&driver).to_vec(), expected.concat());
    driver.wait_needs_reset();
    assert_eq!(
        (gauge(&driver, "connected"), gauge(&driver, "lost")),
        (0, 1)
    );
    for _ in 0..3 {
        ask(&mut driver, &request, 80);
        assert_eq!(driver.used(1), (0, 16), "and so is what comes later");
    }
    ask(&mut driver, &request, 8);
    assert_eq!(driver.used(1), (0, 0), "no room for an answer");
    driver.function.pause();
    ask(&mut driver, &request, 80);
    driver.function.resume();
    assert_eq!(driver.used(1), (0, 16));
    driver.set_status(0);
    let full = driver.offered();
    assert!(driver.negotiate(full));
    driver.set_up(1, &Areas::of(1, 16));
    driver.driver_ok();
    driver.wait_needs_reset();
    ask(&mut driver, &request, 80);
    assert_eq!(
        driver.used(1),
        (0, 16),
        "a driver that starts anew is not kept waiting either"
    );
}

fn socket_path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("testudo-vhu-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// A back-end that can be ended.
struct Mortal(std::os::fd::OwnedFd, JoinHandle<Seen>);

impl Mortal {
    fn new(socket: std::os::fd::OwnedFd) -> Self {
        let end = socket.try_clone().unwrap();
        let run = move || Fake::new(socket, Manners::default()).run();
        Self(end, std::thread::spawn(run))
    }

    fn kill(self) {
        rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both).unwrap();
        self.1.join().unwrap();
    }
}

/// Opens a device whose back-end listens at `path`; the listener and the first back-end.
fn listening(name: &str, reconnect: bool) -> (Driver, UnixListener, Mortal) {
    let path = socket_path(name);
    let listener = UnixListener::bind(&path).unwrap();
    let mut first = None;
    let driver = Driver::new(|io| {
        let options = VhostUserOptions { reconnect, ..blk() };
        std::thread::scope(|scope| {
            let served = scope.spawn(|| Mortal::new(accept(&listener)));
            let device = VhostUser::open(Backend::Path(path), options, io).unwrap();
            first = Some(served.join().unwrap());
            device.model()
        })
    });
    (driver, listener, first.unwrap())
}

fn read_disk(driver: &mut Driver) -> (u32, u8) {
    let descs = [
        Desc::new(BUFFERS, 16, NEXT, 1),
        Desc::new(BUFFERS + 0x1000, 9, WRITE, 0),
    ];
    driver
        .ram
        .write_slice(&[0; 16], GuestAddress(BUFFERS + 0x1000))
        .unwrap();
    driver.submit(0, &descs);
    let (_, len) = driver.used(0);
    let [.., status] = answer::<9>(driver);
    (len, status)
}

#[test]
fn a_back_end_that_comes_back_goes_on() {
    let (mut driver, listener, first) = listening("back", true);
    driver.start_full();
    assert_eq!(read_disk(&mut driver), (9, 0x5a));
    first.kill();
    while gauge(&driver, "lost") == 0 {
        std::thread::yield_now();
    }
    assert_eq!(read_disk(&mut driver), (9, 1), "I/O error meanwhile");
    let _second = Mortal::new(accept(&listener));
    while gauge(&driver, "reconnects") == 0 {
        std::thread::yield_now();
    }
    while read_disk(&mut driver) != (9, 0x5a) {}
    assert_eq!(driver.status(), 0x0f, "no reset is needed");
    driver.function.pause();
    driver.function.resume();
    assert_eq!(read_disk(&mut driver), (9, 0x5a));
}

#[test]
fn without_reconnect_a_reset_finds_the_new_back_end() {
    let (mut driver, listener, first) = listening("reset", false);
    driver.start_full();
    assert_eq!(read_disk(&mut driver), (9, 0x5a));
    first.kill();
    driver.wait_needs_reset();
    assert_eq!(read_disk(&mut driver), (9, 1));
    std::thread::spawn(move || Fake::new(accept(&listener), Manners::default()).run());
    driver.start_full();
    assert_eq!(read_disk(&mut driver), (9, 0x5a));
}

#[test]
fn the_disk_is_what_the_back_end_says() {
    let (socket, backend) = spawn(Manners {
        features: features::COMMON | 1 << 30 | 1 << 12 | 1 << 9 | 1 << 50,
        ..Manners::default()
    });
    let mut driver = Driver::new(|io| {
        let options = options(VhostUserKind::Blk, 2);
        VhostUser::open(Backend::Socket(socket), options, io)
            .unwrap()
            .model()
    });
    assert_eq!(
        driver.offered(),
        features::COMMON | 1 << 12 | 1 << 9,
        "nothing unknown"
    );
    assert_eq!(driver.read::<8>(0x2000), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(
        driver.read::<2>(0x2000 + 34),
        [2, 0],
        "queues as configured"
    );
    driver.start_full();
    driver.write(0x2000 + 32, &[0]);
    driver.write(0x2000, &[0; 8]);
    driver.write(0x2000 + 59, &[0]);
    assert_eq!(read_disk(&mut driver).0, 9);
    drop(driver);
    let seen = backend.join().unwrap();
    let write = [
        &32_u32.to_ne_bytes()[..],
        &1_u32.to_ne_bytes(),
        &[0; 4],
        &[0],
    ]
    .concat();
    assert_eq!(
        seen.config_writes,
        [write],
        "the write cache alone can be set"
    );
}

#[test]
fn a_driver_chooses_how_many_pairs_it_uses() {
    let (socket, backend) = spawn(Manners::default());
    let mut driver = Driver::new(|io| {
        VhostUser::open(Backend::Socket(socket), net(2), io)
            .unwrap()
            .model()
    });
    assert_eq!(driver.u16(reg::NUM_QUEUES), 5);
    assert_eq!(
        driver.read::<10>(0x2000),
        [0x52, 0x54, 0, 1, 2, 3, 1, 0, 2, 0]
    );
    driver.start_full();
    let command = |driver: &mut Driver, bytes: [u8; 4]| {
        driver
            .ram
            .write_slice(&bytes, GuestAddress(BUFFERS))
            .unwrap();
        let descs = [
            Desc::new(BUFFERS, 4, NEXT, 1),
            Desc::new(BUFFERS + 0x1000, 1, WRITE, 0),
        ];
        driver.submit(4, &descs);
        assert_eq!(driver.used(4), (0, 1));
        answer::<1>(driver)[0]
    };
    assert_eq!(command(&mut driver, [4, 0, 2, 0]), 0);
    for wrong in [
        [4, 0, 3, 0],
        [4, 0, 0, 0],
        [4, 1, 1, 0],
        [0, 0, 1, 0],
        [4, 0, 0, 0x80],
    ] {
        assert_eq!(command(&mut driver, wrong), 1, "{wrong:?}");
    }
    driver.function.pause();
    driver.function.resume();
    assert_eq!(command(&mut driver, [4, 0, 1, 0]), 0);
    let Driver { function, io, .. } = driver;
    // The thread's end, without a stop, leaves what the back-end has seen last.
    drop(io);
    drop(function);
    let enabled = backend.join().unwrap().enabled;
    assert_eq!(
        enabled,
        [(0, true), (1, true), (2, false), (3, false)].into()
    );
}

#[test]
fn features_that_the_back_end_lacks_are_not_offered() {
    let manners = Manners {
        features: features::VERSION_1,
        ..Manners::default()
    };
    let mut driver = Driver::new(|io| open(manners, net(1), io).model());
    assert_eq!(driver.offered() & features::COMMON, features::VERSION_1);
    let offered = driver.offered();
    driver.start(offered);
    for _ in 0..3 {
        driver.submit(0, &[Desc::new(BUFFERS, 64, WRITE, 0)]);
        assert_eq!(
            driver.used(0),
            (0, 64),
            "a table of RAM, no acknowledgements"
        );
    }
    driver.function.pause();
    driver.function.resume();
    driver.submit(0, &[Desc::new(BUFFERS, 64, WRITE, 0)]);
    assert_eq!(driver.used(0), (0, 64));
}

#[test]
fn unfit_back_ends_are_refused_with_the_reason() {
    let with = |features| Manners {
        features,
        ..Manners::default()
    };
    let said = refused(with(1 << 30), fs());
    assert_eq!(
        said,
        "the back-end offers no modern device (VIRTIO_F_VERSION_1)"
    );
    let said = refused(with(features::VERSION_1), blk());
    assert!(said.contains("keeps no configuration space"), "{said}");
    let few = Manners {
        queues: 3,
        ..Manners::default()
    };
    let said = refused(few, net(2));
    assert!(said.contains("has 3 queues, this device needs 4"), "{said}");
    let path = socket_path("nobody");
    let nobody = Connection::open(&path).err().unwrap().to_string();
    assert!(
        nobody.contains("no vhost-user back-end answers at /"),
        "{nobody}"
    );
    let file: std::os::fd::OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let said = Connection::from_socket(file).err().unwrap().to_string();
    assert!(
        said.contains("not a connected Unix stream socket"),
        "{said}"
    );
}

/// A back-end that is silent keeps nobody for longer than the deadline.
#[test]
fn a_silent_back_end_is_given_up() {
    let silent = Manners {
        twist: Box::new(|request, reply| match request {
            1 => Answer::Nothing,
            _ => honest(request, reply),
        }),
        ..Manners::default()
    };
    let begun = Instant::now();
    let said = refused(silent, fs());
    assert_eq!(said, "the back-end does not answer GET_FEATURES in time");
    assert!(begun.elapsed() < PATIENCE * 2);
}

#[test]
fn a_back_end_that_stops_without_returning_chains_is_given_up() {
    let hoarder = Manners {
        hoards: true,
        ..Manners::default()
    };
    let mut driver = Driver::new(|io| open(hoarder, fs(), io).model());
    driver.start_full();
    ask(&mut driver, &[0; 40], 64);
    std::thread::sleep(std::time::Duration::from_millis(50));
    let begun = Instant::now();
    driver.set_status(0);
    assert!(begun.elapsed() < PATIENCE * 2);
    assert_eq!((driver.status(), gauge(&driver, "lost")), (0, 1));
}

#[test]
fn wrong_answers_end_the_connection_and_nothing_else() {
    let reply = |request: u32, flags: u32, payload: &[u8]| {
        let len = u32::try_from(payload.len()).unwrap();
        [
            &[request, flags, len].map(u32::to_ne_bytes).concat(),
            payload,
        ]
        .concat()
    };
    // Of the positions of a ring that is stopped.
    let cases = [
        reply(11, 5, &[]),
        reply(11, 5, &[0; 12]),
        reply(11, 1, &[0; 8]),
        reply(12, 5, &[0; 8]),
        reply(11, 5, &[0xff; 8]),
        reply(11, 5, &[[0; 4], [0, 0, 1, 0]].concat()),
        [11, 5, u32::MAX].map(u32::to_ne_bytes).concat(),
        vec![0xff; 3],
    ];
    for bytes in cases {
        let wrong = bytes.clone();
        let manners = Manners {
            twist: Box::new(move |request, reply| match request {
                11 => Answer::Send(wrong.clone()),
                _ => honest(request, reply),
            }),
            ..Manners::default()
        };
        let mut driver = Driver::new(|io| open(manners, fs(), io).model());
        driver.start_full();
        ask(&mut driver, &[0; 40], 64);
        assert_eq!(driver.used(1), (0, 64));
        driver.set_status(0);
        assert_eq!(
            (driver.status(), gauge(&driver, "lost")),
            (0, 1),
            "{bytes:?}"
        );
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_dropped() {
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let manners = Manners {
        twist: Box::new(|_, reply| match reply {
            Some(reply) => Answer::SendWithFds(reply, 60),
            None => Answer::Nothing,
        }),
        ..Manners::default()
    };
    let mut driver = Driver::new(|io| open(manners, fs(), io).model());
    let before = open_files();
    driver.start_full();
    ask(&mut driver, &[0; 40], 64);
    assert_eq!(driver.used(1), (0, 64));
    // Other tests of the process open files, too, but not thousands.
    assert!(open_files() < before + 500);
}

#[test]
fn words_without_a_question_end_the_connection() {
    let (socket, backend) = spawn(Manners {
        twist: Box::new(|request, reply| {
            let twice = |reply: Vec<u8>| Answer::Send([reply.clone(), reply].concat());
            match request {
                // The last of a start.
                18 => reply.map_or(Answer::Nothing, twice),
                _ => honest(request, reply),
            }
        }),
        ..Manners::default()
    });
    let mut driver = Driver::new(|io| {
        VhostUser::open(Backend::Socket(socket), fs(), io)
            .unwrap()
            .model()
    });
    driver.start_full_or_broken();
    driver.wait_needs_reset();
    assert_eq!(gauge(&driver, "lost"), 1);
    drop(driver);
    drop(backend.join());
}

fn refusing(request_to_refuse: u32) -> Manners {
    Manners {
        twist: Box::new(move |request, reply| {
            if request != request_to_refuse {
                return honest(request, reply);
            }
            let no = [request, 5, 8].map(u32::to_ne_bytes).concat();
            Answer::Send([no, 1_u64.to_ne_bytes().to_vec()].concat())
        }),
        ..Manners::default()
    }
}

#[test]
fn a_refusal_leads_to_a_device_that_needs_a_reset() {
    for request in [2, 8, 9, 10, 12, 13, 18, 37] {
        let mut driver = Driver::new(|io| open(refusing(request), fs(), io).model());
        driver.start_full_or_broken();
        driver.wait_needs_reset();
        assert_eq!(gauge(&driver, "lost"), 1, "{request}");
        ask(&mut driver, &[0; 40], 64);
        assert_eq!(driver.used(1), (0, 16), "{request}");
    }
}

#[test]
fn the_back_end_hears_of_ram_that_comes_and_goes() {
    let (socket, backend) = spawn(Manners::default());
    let mut listener = None;
    let mut driver = Driver::new(|io| {
        let device = VhostUser::open(Backend::Socket(socket), fs(), io).unwrap();
        listener = Some(device.ram_listener());
        device.model()
    });
    let shared = Backing {
        share: Share::Shared,
        ..Backing::default()
    };
    let mut ram = GuestRam::new();
    ram.listen(listener.unwrap()).unwrap();
    ram.add(1 << 32, 2 << 20, &shared).unwrap();
    driver.start_full();
    ram.add(1 << 33, 4 << 20, &shared).unwrap();
    ask(&mut driver, &[0; 40], 64);
    assert_eq!(driver.used(1), (0, 64), "rings are served as before");
    ram.remove(1 << 33).unwrap();
    let private = ram.add(1 << 34, 2 << 20, &Backing::default()).unwrap_err();
    let why = std::error::Error::source(&private).unwrap().to_string();
    assert!(
        why.contains("add `shared` to the memory's options"),
        "{why}"
    );
    drop(driver);
    drop(ram);
    let seen = backend.join().unwrap();
    let first = (0, crate::driver::RAM_SIZE as u64);
    assert_eq!(seen.regions, [first, (1 << 33, 4 << 20)]);
    assert_eq!(seen.requests.iter().filter(|r| **r == 38).count(), 1);
}

#[test]
fn the_back_end_says_that_its_configuration_changed() {
    let (socket, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let requests = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&requests);
    let backend = std::thread::spawn(move || {
        Fake::new(theirs, Manners::default())
            .keep_requests(&kept)
            .run()
    });
    let mut driver = Driver::new(|io| {
        VhostUser::open(Backend::Socket(socket), blk(), io)
            .unwrap()
            .model()
    });
    driver.start_full();
    let channel: std::os::fd::OwnedFd = requests.lock().unwrap().take().unwrap();
    let before: [u8; 1] = driver.read(0x15);
    let change = [2_u32, 1 | 8, 0].map(u32::to_ne_bytes).concat();
    rustix::io::write(&channel, &change).unwrap();
    driver.interrupt(0);
    assert_ne!(driver.read::<1>(0x15), before, "a new generation");
    let mut acknowledgement = [0; 20];
    let mut file = std::fs::File::from(channel.try_clone().unwrap());
    io::Read::read_exact(&mut file, &mut acknowledgement).unwrap();
    assert_eq!(acknowledgement[..4], 2_u32.to_ne_bytes());
    assert_eq!(read_disk(&mut driver), (9, 0x5a));
    rustix::io::write(&channel, &[0xee; 12]).unwrap();
    driver.wait_needs_reset();
    drop(backend.join());
    assert_eq!(
        read_disk(&mut driver),
        (9, 1),
        "a back-end that asks for nonsense is dropped"
    );
}

/// A driver may leave garbage where the rings were when the back-end goes.
#[test]
fn rings_that_make_no_sense_are_survived_when_the_back_end_goes() {
    let (socket, _backend) = spawn(Manners {
        hoards: true,
        ..Manners::default()
    });
    let peer = socket.try_clone().unwrap();
    let mut driver = Driver::new(|io| {
        VhostUser::open(Backend::Socket(socket), fs(), io)
            .unwrap()
            .model()
    });
    driver.start_full();
    let areas = Areas::of(1, 16);
    put_u16(&driver.ram, areas.used + 2, 0x7fff);
    write_desc(
        &driver.ram,
        areas.desc,
        0,
        Desc::new(u64::MAX, u32::MAX, 0xffff, 0xffff),
    );
    rustix::net::shutdown(&peer, rustix::net::Shutdown::Both).unwrap();
    driver.wait_needs_reset();
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a back-end answers, the device comes to an end that a driver can see.
    #[test]
    fn arbitrary_answers_are_survived(
        nth in 0_usize..40,
        bytes in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut count = 0;
        let manners = Manners {
            twist: Box::new(move |request, reply| {
                count += 1;
                match count == nth {
                    true if bytes.is_empty() => Answer::Close,
                    true => {
                        // Long enough for any header, so that nobody waits for more.
                        let mut bytes = bytes.clone();
                        bytes.resize(64, 0xff);
                        Answer::Send(bytes)
                    }
                    false => honest(request, reply),
                }
            }),
            ..Manners::default()
        };
        let io = IoThread::spawn("io-test", || Ok(())).unwrap();
        let (socket, _) = spawn(manners);
        if let Ok(device) = VhostUser::open(Backend::Socket(socket), blk(), &io.handle()) {
            let mut driver = Driver::new(|_| device.model());
            driver.start_full_or_broken();
            let (len, status) = read_disk(&mut driver);
            prop_assert!(len == 9 && (status == 1 || status == 0x5a));
            driver.set_status(0);
            prop_assert_eq!(driver.status(), 0);
        }
    }
}
