//! What the init is told to do: a list of verbs from the kernel command line.
//!
//! ```text
//! console=ttyS0 quiet testudo.do=facts,rng=4096,poweroff
//! console=ttyS0 quiet -- facts rng=4096 poweroff
//! ```
//! Both forms may be mixed; those of `testudo.do` come first. With no orders at all it is
//! `facts,poweroff`; a list that does not end the machine is followed by a power-off.

/// How the kernel shall reset the machine: the names that `/sys/kernel/reboot/type` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reset {
    /// Whatever the kernel would take by itself.
    Default,
    /// The FADT's reset register.
    Acpi,
    /// The keyboard controller's pulse (port 0x64).
    Keyboard,
    /// An empty interrupt table.
    TripleFault,
    /// Port 0xcf9.
    Pci,
}

use crate::dax::DaxMount;

/// One thing to do. README of the verbs: each variant's comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    /// `facts`: `FACT key=value` lines about processors, memory, PCI, interrupts, clocks.
    Facts,
    /// `dmesg[=LEVEL]`: the kernel log, records of that level (0..=7) and worse.
    Dmesg(u8),
    /// `modules`: loads `/modules/<release>/NN-name.ko` in order; nothing for a kernel that needs none.
    Modules,
    /// `msr`: MTRR and PAT registers of every CPU, when the kernel has its msr driver.
    Msr,
    /// `percpu`: runs on each online CPU in turn and says so.
    PerCpu,
    /// `touch=MIB`: writes and reads back that much memory.
    Touch(u64),
    /// `rng[=BYTES]`: reads from `/dev/hwrng`, tells count and hash.
    Rng(usize),
    /// `entropy`: the state of the kernel's random pool.
    Entropy,
    /// `serial-flood=KIB`: that much of a pattern that shows loss.
    SerialFlood(u64),
    /// `agent`: holds, checks and drops memory as the console's lines say.
    Agent,
    /// `dax=DEVICE:TYPE[:ro]`: mounts a file system of persistent memory.
    MountDax(DaxMount),
    /// `read=NAME`: reads a file of the mount; tells its hash and what it cost in page cache.
    ReadFile(String),
    /// `write=NAME:KIB`: writes a file of the mount, syncs and unmounts.
    WriteFile(String, usize),
    /// `poke=DEVICE[:end]`: writes to a block device and tells whether it took it.
    Poke(String),
    /// `echo`: sends each line of the console back, until `quit` or end of input.
    Echo,
    /// `script`: enters the Debian userland of a disk and runs `/script` of the initramfs there.
    Script,
    /// `time`: from here on the monotonic clock at each verb.
    Time,
    /// `say=TEXT`: prints it.
    Say(String),
    /// `sleep=MS`
    Sleep(u64),
    /// `sleep-forever`: idle, with interrupts on.
    SleepForever,
    /// `hang`: one CPU spins for ever.
    Hang,
    /// `vsock-serve=PORT`: does on that port of the guest what connections ask for, until `quit`.
    VsockServe(u32),
    /// `vsock-dial=PORT:STREAMS:KIB`: so many connections to the host at once, each sending and
    /// getting back so much.
    VsockDial(u32, u64, u64),
    /// `vsock-refused=PORT`: tries to connect to the host and tells what came of it.
    VsockRefused(u32),
    /// `watchdog=SECONDS:TIMES`: starts the watchdog and feeds it so many times, every half second;
    /// `watchdog-stop` stops it afterwards.
    Watchdog(i32, u32, bool),
    /// `port-echo=NAME`: sends lines back on that virtio port, until `quit`.
    PortEcho(String),
    /// `port-flood=NAME:BYTES`: sends that much of a pattern.
    PortFlood(String, u64),
    /// `port-sink=NAME:BYTES`: reads that much of a pattern and tells whether it was whole.
    PortSink(String, u64),
    /// `console-size`: columns and rows of the console.
    ConsoleSize,
    /// `port80=VALUE`: a byte to the debug port.
    Port80(u8),
    /// `wait-button`: powers off once the ACPI power button is pressed.
    WaitButton,
    /// `poweroff`
    PowerOff,
    /// `reboot[=acpi|kbd|triple|pci]`, and `triple-fault` for `reboot=triple`.
    Reboot(Reset),
    /// `panic`: by sysrq.
    Panic,
    /// `exit`: init ends, at which the kernel panics.
    Exit,
    /// Not a verb, or not a value it takes. Said aloud so that a test cannot pass by a typing error.
    Unknown(String),
}

const DEFAULT_RNG: usize = 64;

impl Order {
    fn parse(word: &str) -> Order {
        let (verb, value) = match word.split_once('=') {
            Some((verb, value)) => (verb, Some(value)),
            None => (word, None),
        };
        Order::known(verb, value).unwrap_or_else(|| Order::Unknown(word.to_owned()))
    }

    fn known(verb: &str, value: Option<&str>) -> Option<Order> {
        let plain = |order| value.is_none().then_some(order);
        match verb {
            "facts" => plain(Order::Facts),
            "dmesg" => match value {
                None => Some(Order::Dmesg(7)),
                Some(v) => v.parse().ok().filter(|l| *l <= 7).map(Order::Dmesg),
            },
            "modules" => plain(Order::Modules),
            "msr" => plain(Order::Msr),
            "percpu" => plain(Order::PerCpu),
            "touch" => value?.parse().ok().map(Order::Touch),
            "rng" => match value {
                None => Some(Order::Rng(DEFAULT_RNG)),
                Some(v) => v.parse().ok().map(Order::Rng),
            },
            "entropy" => plain(Order::Entropy),
            "serial-flood" => value?.parse().ok().map(Order::SerialFlood),
            "agent" => plain(Order::Agent),
            "dax" => DaxMount::parse(value?).map(Order::MountDax),
            "read" => Some(Order::ReadFile(value?.to_owned())),
            "write" => {
                let (name, kib) = value?.split_once(':')?;
                Some(Order::WriteFile(name.to_owned(), kib.parse().ok()?))
            }
            "poke" => Some(Order::Poke(value?.to_owned())),
            "echo" => plain(Order::Echo),
            "script" => plain(Order::Script),
            "time" => plain(Order::Time),
            "say" => Some(Order::Say(value?.to_owned())),
            "sleep" => value?.parse().ok().map(Order::Sleep),
            "sleep-forever" => plain(Order::SleepForever),
            "hang" => plain(Order::Hang),
            "vsock-serve" => value?.parse().ok().map(Order::VsockServe),
            "vsock-dial" => {
                let mut words = value?.split(':');
                let port = words.next()?.parse().ok()?;
                let streams = words.next()?.parse().ok()?;
                let kib = words.next()?.parse().ok()?;
                Some(Order::VsockDial(port, streams, kib))
            }
            "vsock-refused" => value?.parse().ok().map(Order::VsockRefused),
            "watchdog" | "watchdog-stop" => {
                let (seconds, times) = value?.split_once(':')?;
                let (seconds, times) = (seconds.parse().ok()?, times.parse().ok()?);
                Some(Order::Watchdog(seconds, times, verb == "watchdog-stop"))
            }
            "port-echo" => Some(Order::PortEcho(value?.to_owned())),
            "port-flood" | "port-sink" => {
                let (name, bytes) = value?.split_once(':')?;
                let (name, bytes) = (name.to_owned(), bytes.parse().ok()?);
                Some(if verb == "port-flood" {
                    Order::PortFlood(name, bytes)
                } else {
                    Order::PortSink(name, bytes)
                })
            }
            "console-size" => plain(Order::ConsoleSize),
            "port80" => byte(value?).map(Order::Port80),
            "wait-button" => plain(Order::WaitButton),
            "poweroff" => plain(Order::PowerOff),
            "reboot" => Some(Order::Reboot(match value {
                None => Reset::Default,
                Some("acpi") => Reset::Acpi,
                Some("kbd") => Reset::Keyboard,
                Some("triple") => Reset::TripleFault,
                Some("pci") => Reset::Pci,
                Some(_) => return None,
            })),
            "triple-fault" => plain(Order::Reboot(Reset::TripleFault)),
            "panic" => plain(Order::Panic),
            "exit" => plain(Order::Exit),
            _ => None,
        }
    }
}

fn byte(text: &str) -> Option<u8> {
    match text.strip_prefix("0x") {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The orders on a kernel command line, each with the word it was given by.
pub(crate) fn orders(command_line: &str) -> Vec<(String, Order)> {
    let mut words: Vec<&str> = Vec::new();
    let mut plain: Vec<&str> = Vec::new();
    let mut ours = false;
    for word in command_line.split_whitespace() {
        if ours {
            plain.push(word);
        } else if word == "--" {
            ours = true;
        } else if let Some(list) = word.strip_prefix("testudo.do=") {
            words.extend(list.split(',').filter(|w| !w.is_empty()));
        }
    }
    words.extend(plain);
    if words.is_empty() {
        words.extend(["facts", "poweroff"]);
    }
    words
        .into_iter()
        .map(|w| (w.to_owned(), Order::parse(w)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(command_line: &str) -> Vec<Order> {
        orders(command_line).into_iter().map(|(_, o)| o).collect()
    }

    #[test]
    fn the_key_and_the_words_after_the_dashes_are_orders() {
        let line = "console=ttyS0 facts testudo.do=time,rng=4096 quiet -- serial-flood=64 poweroff";
        let expected = [
            Order::Time,
            Order::Rng(4096),
            Order::SerialFlood(64),
            Order::PowerOff,
        ];
        assert_eq!(parsed(line), expected);
    }

    #[test]
    fn without_orders_it_tells_facts_and_powers_off() {
        assert_eq!(parsed("quiet"), [Order::Facts, Order::PowerOff]);
        assert_eq!(parsed("testudo.do= --"), [Order::Facts, Order::PowerOff]);
    }

    #[test]
    fn every_verb_is_reached_by_its_name() {
        let line = "testudo.do=facts,dmesg,dmesg=4,modules,msr,percpu,touch=16,rng,entropy,serial-flood=1,echo,\
                    script,time,say=hi,sleep=5,sleep-forever,hang,port80=0x41,port80=7,wait-button,poweroff,\
                    reboot,reboot=acpi,reboot=kbd,reboot=triple,reboot=pci,triple-fault,panic,exit,
                    agent,dax=pmem0:ext4,dax=pmem0:erofs:ro,read=data,write=new:4,poke=pmem0,
                    vsock-serve=5000,vsock-dial=80:200:64,vsock-refused=9,watchdog=3:4,watchdog-stop=3:4,
                    port-echo=a,port-flood=a:1,port-sink=a:1,console-size";
        let line = line.replace(char::is_whitespace, "");
        let all = parsed(&line);
        assert_eq!(all.len(), 44);
        assert!(
            !all.iter().any(|o| matches!(o, Order::Unknown(_))),
            "{all:?}"
        );
        assert!(all.contains(&Order::Port80(0x41)) && all.contains(&Order::Port80(7)));
    }

    #[test]
    fn what_is_not_a_verb_is_told_and_not_skipped() {
        for bad in [
            "fact",
            "rng=x",
            "port80=256",
            "poweroff=now",
            "dmesg=8",
            "reboot=bios",
            "touch",
            "dax=pmem0",
            "dax=pmem0:ext4:rw",
            "write=new",
            "vsock-dial=80",
        ] {
            let line = format!("testudo.do={bad}");
            assert_eq!(parsed(&line), [Order::Unknown(bad.to_owned())]);
        }
    }
}
