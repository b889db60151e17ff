//! `FACT key=value` lines: what the kernel made of the machine it was given. Read-only, from
//! `/proc` and `/sys`; what a kernel does not offer is left out.

use std::fs;
use std::path::Path;

use crate::console::Console;

const CPUS: &str = "/sys/devices/system/cpu";
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0";
const PCI: &str = "/sys/bus/pci/devices";
/// What of `flags` in `/proc/cpuinfo` tells about clocks and the hypervisor.
const FLAGS: [&str; 12] = [
    "apic",
    "arch_perfmon",
    "constant_tsc",
    "hypervisor",
    "mtrr",
    "nonstop_tsc",
    "nx",
    "pat",
    "rdrand",
    "tsc_deadline_timer",
    "tsc_known_freq",
    "x2apic",
];

/// Prints all of it.
pub(crate) fn print(console: &mut Console) {
    if let Some(release) = read("/proc/sys/kernel/osrelease") {
        console.fact("kernel", release);
    }
    processors(console);
    memory(console);
    mtrr(console);
    if let Some(current) = read(format!("{CLOCK}/current_clocksource")) {
        console.fact("clocksource", current);
    }
    if let Some(all) = read(format!("{CLOCK}/available_clocksource")) {
        console.fact("clocksources", all);
    }
    pci(console);
    interrupts(console);
    if let Ok(tables) = fs::read_dir("/sys/firmware/acpi/tables") {
        let mut tables = names(tables);
        tables.retain(|name| name != "data" && name != "dynamic");
        console.fact("acpi_tables", tables.join(" "));
    }
}

/// The CPUs of a list as `/sys` writes it: `0-3,8`.
pub(crate) fn cpu_list(list: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            cpus.extend(first..=last);
        }
    }
    cpus
}

/// The CPUs that are online.
pub(crate) fn online() -> Vec<usize> {
    cpu_list(&read(format!("{CPUS}/online")).unwrap_or_default())
}

fn processors(console: &mut Console) {
    for set in ["online", "possible", "present"] {
        if let Some(list) = read(format!("{CPUS}/{set}")) {
            console.fact(format_args!("cpus_{set}"), cpu_list(&list).len());
            console.fact(format_args!("cpus_{set}_list"), list);
        }
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let blocks: Vec<&str> = cpuinfo.split("\n\n").collect();
    let first = blocks.first().copied().unwrap_or_default();
    for (key, field) in [
        ("cpu_vendor", "vendor_id"),
        ("cpu_model", "model name"),
        ("cpu_mhz", "cpu MHz"),
    ] {
        if let Some(value) = cpuinfo_field(first, field) {
            console.fact(key, value);
        }
    }
    let flags = cpuinfo_field(first, "flags").unwrap_or_default();
    let ours: Vec<&str> = flags.split(' ').filter(|f| FLAGS.contains(f)).collect();
    console.fact("cpu_flags", ours.join(" "));
    for cpu in online() {
        let number = cpu.to_string();
        let block = blocks
            .iter()
            .find(|b| cpuinfo_field(b, "processor") == Some(&number));
        let apic = block
            .and_then(|b| cpuinfo_field(b, "apicid"))
            .unwrap_or("?");
        console.fact(
            format_args!("cpu.{cpu}"),
            format_args!("{} apicid:{apic} caches:{}", topology(cpu), caches(cpu)),
        );
    }
}

fn topology(cpu: usize) -> String {
    let dir = format!("{CPUS}/cpu{cpu}/topology");
    [
        ("package", "physical_package_id"),
        ("die", "die_id"),
        ("core", "core_id"),
        ("threads", "thread_siblings_list"),
        ("cores", "core_siblings_list"),
    ]
    .iter()
    .map(|(key, file)| {
        format!(
            "{key}:{}",
            read(format!("{dir}/{file}")).unwrap_or_else(|| "?".into())
        )
    })
    .collect::<Vec<_>>()
    .join(" ")
}

/// `L1d/32K/0,L2/512K/0,…`: level and type, size, the CPUs that share it.
fn caches(cpu: usize) -> String {
    let mut caches = Vec::new();
    for index in 0..8 {
        let dir = format!("{CPUS}/cpu{cpu}/cache/index{index}");
        let Some(level) = read(format!("{dir}/level")) else {
            break;
        };
        let kind = match read(format!("{dir}/type")).as_deref() {
            Some("Data") => "d",
            Some("Instruction") => "i",
            _ => "",
        };
        let size = read(format!("{dir}/size")).unwrap_or_default();
        let shared = read(format!("{dir}/shared_cpu_list")).unwrap_or_default();
        caches.push(format!(
            "L{level}{kind}/{size}/{}",
            shared.replace(',', "+")
        ));
    }
    caches.join(",")
}

fn memory(console: &mut Console) {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    for (key, field) in [("mem_total_kib", "MemTotal"), ("mem_free_kib", "MemFree")] {
        let value = meminfo
            .lines()
            .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
        if let Some(kib) = value.and_then(|v| v.split_whitespace().next()) {
            console.fact(key, kib);
        }
    }
    let iomem = fs::read_to_string("/proc/iomem").unwrap_or_default();
    for (n, line) in iomem.lines().filter(|l| !l.starts_with(' ')).enumerate() {
        console.fact(format_args!("iomem.{n}"), line);
    }
}

fn mtrr(console: &mut Console) {
    let Ok(text) = fs::read_to_string("/proc/mtrr") else {
        return;
    };
    console.fact("mtrrs", text.lines().count());
    for (n, line) in text.lines().enumerate() {
        console.fact(format_args!("mtrr.{n}"), line);
    }
}

fn pci(console: &mut Console) {
    let Ok(devices) = fs::read_dir(PCI) else {
        return;
    };
    for address in names(devices) {
        let dir = format!("{PCI}/{address}");
        let hex = |file: &str| read(format!("{dir}/{file}")).unwrap_or_default();
        let driver = fs::read_link(format!("{dir}/driver"))
            .ok()
            .and_then(|d| Some(d.file_name()?.to_string_lossy().into_owned()));
        let bars = bars(&fs::read_to_string(format!("{dir}/resource")).unwrap_or_default());
        console.fact(
            format_args!("pci.{address}"),
            format_args!(
                "class:{} id:{}:{} driver:{} bars:{bars}",
                hex("class"),
                hex("vendor"),
                hex("device"),
                driver.as_deref().unwrap_or("-"),
            ),
        );
    }
}

/// The first six rows of a `resource` file that are in use: `N@START+LENGTH/FLAGS`.
fn bars(resource: &str) -> String {
    let mut bars = Vec::new();
    for (n, row) in resource.lines().take(6).enumerate() {
        let numbers: Vec<u64> = row
            .split_whitespace()
            .filter_map(|w| u64::from_str_radix(w.strip_prefix("0x")?, 16).ok())
            .collect();
        let &[start, end, flags] = numbers.as_slice() else {
            continue;
        };
        if flags != 0 {
            let length = end.wrapping_sub(start).wrapping_add(1);
            bars.push(format!("{n}@{start:#x}+{length:#x}/{flags:#x}"));
        }
    }
    if bars.is_empty() {
        "-".to_owned()
    } else {
        bars.join(",")
    }
}

fn interrupts(console: &mut Console) {
    let text = fs::read_to_string("/proc/interrupts").unwrap_or_default();
    for line in text.lines().skip(1) {
        if let Some((name, count, who)) = interrupt(line).filter(|(_, count, _)| *count > 0) {
            console.fact(format_args!("irq.{name}"), format_args!("{count} {who}"));
        }
    }
}

/// Name, count over all CPUs and description of one row of `/proc/interrupts`.
fn interrupt(line: &str) -> Option<(&str, u64, String)> {
    let (name, rest) = line.split_once(':')?;
    let mut count = 0_u64;
    let mut who = Vec::new();
    for word in rest.split_whitespace() {
        match word.parse::<u64>() {
            Ok(n) if who.is_empty() => count = count.saturating_add(n),
            _ => who.push(word),
        }
    }
    Some((name.trim(), count, who.join(" ")))
}

fn cpuinfo_field<'a>(block: &'a str, field: &str) -> Option<&'a str> {
    block.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == field).then(|| value.trim())
    })
}

/// A line of `/proc/meminfo`, whose key is written with its colon.
pub(crate) fn meminfo_kib(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The trimmed text of a small file.
pub(crate) fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn names(dir: fs::ReadDir) -> Vec<String> {
    let mut names: Vec<String> = dir
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_have_ranges_and_single_numbers() {
        assert_eq!(cpu_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(cpu_list("0"), [0]);
        assert_eq!(cpu_list("\n"), [] as [usize; 0]);
    }

    #[test]
    fn an_interrupt_row_is_summed_over_cpus() {
        let row = "  24:         10          5  PCI-MSI 16384-edge      virtio0-config";
        let (name, count, who) = interrupt(row).unwrap();
        assert_eq!((name, count), ("24", 15));
        assert_eq!(who, "PCI-MSI 16384-edge virtio0-config");
        assert_eq!(
            interrupt(" LOC:  7  8   Local timer interrupts").unwrap().1,
            15
        );
    }

    #[test]
    fn only_bars_in_use_are_listed() {
        let rows = "0x00000000c0000000 0x00000000c0000fff 0x0000000000040200\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000008000000000 0x0000008000003fff 0x000000000014220c\n";
        assert_eq!(
            bars(rows),
            "0@0xc0000000+0x1000/0x40200,2@0x8000000000+0x4000/0x14220c"
        );
        assert_eq!(bars(""), "-");
    }

    #[test]
    fn cpuinfo_fields_are_matched_whole() {
        let block =
            "processor\t: 1\nvendor_id\t: AuthenticAMD\napicid\t\t: 3\ninitial apicid\t: 4\n";
        assert_eq!(cpuinfo_field(block, "apicid"), Some("3"));
        assert_eq!(cpuinfo_field(block, "vendor"), None);
    }
}
