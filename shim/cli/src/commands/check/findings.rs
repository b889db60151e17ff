//! What can be seen without running anything.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use serde::Serialize;

use crate::config::Config;
use crate::places::{INITRAMFS, KERNEL, Part, VMM, passt};

/// What is thought of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// As it should be.
    Good,
    /// Something does without it.
    Optional,
    /// No pod runs like this.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What.
    pub(crate) about: String,
    /// Verdict.
    pub(crate) verdict: Verdict,
    /// What was seen.
    pub(crate) said: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

impl Finding {
    pub(crate) fn good(about: &str, said: &str) -> Self {
        Self {
            about: about.into(),
            verdict: Verdict::Good,
            said: said.into(),
            remedy: None,
        }
    }

    pub(crate) fn bad(about: &str, said: &str, remedy: &str) -> Self {
        Self {
            about: about.into(),
            verdict: Verdict::Bad,
            said: said.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn optional(about: &str, said: &str, remedy: &str) -> Self {
        Self {
            verdict: Verdict::Optional,
            ..Self::bad(about, said, remedy)
        }
    }

    pub(crate) fn line(&self) -> String {
        let mark = match self.verdict {
            Verdict::Good => "ok  ",
            Verdict::Optional => "--  ",
            Verdict::Bad => "BAD ",
        };
        let remedy = self
            .remedy
            .as_ref()
            .map_or_else(String::new, |remedy| format!("\n      {remedy}"));
        format!("{mark}  {}: {}{remedy}", self.about, self.said)
    }
}

/// The VMM, the guest's kernel, the agent.
pub(super) fn parts(config: &Config) -> Vec<Finding> {
    let part = |about: &str, part: Part, named: &Option<std::path::PathBuf>| match part
        .find(named.as_deref())
    {
        Ok(path) => Finding::good(about, &path.display().to_string()),
        Err(missing) => {
            let words = missing.to_string();
            let (said, remedy) = words.rsplit_once("; ").unwrap_or((&words, ""));
            Finding::bad(about, said, remedy)
        }
    };
    vec![
        part("VMM", VMM, &config.vmm_program),
        part("guest kernel", KERNEL, &config.guest_kernel),
        part("guest initramfs", INITRAMFS, &config.guest_initramfs),
    ]
}

const KVM: &str = "/dev/kvm";

/// Present and permitted.
pub(super) fn kvm() -> Vec<Finding> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let module = match (flags.contains(" vmx"), flags.contains(" svm")) {
        (true, _) => "kvm_intel",
        (_, true) => "kvm_amd",
        _ => "kvm",
    };
    let mut all = Vec::new();
    // Some hosts hide it and have a /dev/kvm all the same; a guest is what decides.
    if std::env::consts::ARCH == "x86_64" && module == "kvm" && !Path::new(KVM).exists() {
        all.push(Finding::bad(
            "processor",
            "it has no virtualisation (vmx or svm), or hides it",
            "switch it on in the firmware; in a virtual machine, have its host allow nested virtualisation",
        ));
    }
    all.push(match File::options().read(true).write(true).open(KVM) {
        Ok(_) => Finding::good("KVM", "/dev/kvm can be opened"),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let remedy = format!(
                "load its module: `modprobe {module}`; without one the kernel lacks CONFIG_KVM"
            );
            Finding::bad("KVM", "there is no /dev/kvm", &remedy)
        }
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Finding::bad(
            "KVM",
            "this user may not open /dev/kvm",
            "add it to the group that owns the device: `usermod -aG kvm USER`, and log in anew",
        ),
        Err(e) => Finding::bad(
            "KVM",
            &format!("/dev/kvm cannot be opened: {e}"),
            "see `dmesg`",
        ),
    });
    all
}

/// What only some pods need.
pub(super) fn rest(config: &Config) -> Vec<Finding> {
    let device = |about: &str, path: &str, remedy: &str| match File::options()
        .read(true)
        .write(true)
        .open(path)
    {
        Ok(_) => Finding::good(about, &format!("{path} can be opened")),
        Err(e) => Finding::optional(about, &format!("{path}: {e}"), remedy),
    };
    let groups = std::fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    let iommu = if groups > 0 {
        Finding::good("IOMMU", &format!("{groups} groups"))
    } else {
        Finding::optional(
            "IOMMU",
            "none",
            "needed for passing devices through; switch it on in the firmware and with intel_iommu=on",
        )
    };
    let cgroups = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Finding::good("cgroups", "version 2 is mounted")
    } else {
        Finding::optional(
            "cgroups",
            "version 2 is not mounted",
            "not needed for testudo run: limits hold in the guest",
        )
    };
    let net = match passt(config) {
        Some(path) if path.is_file() => {
            Finding::good("network", &format!("{} serves --net user", path.display()))
        }
        Some(path) => Finding::optional(
            "network",
            &format!("there is no {}", path.display()),
            "correct network.passt",
        ),
        None => Finding::optional(
            "network",
            "passt is not installed",
            "needed for --net user: `apt install passt`",
        ),
    };
    let huge =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let huge = if huge.contains("[never]") {
        let remedy = "guests are quicker with it: write madvise to /sys/kernel/mm/transparent_hugepage/enabled";
        Finding::optional("huge pages", "transparent huge pages are off", remedy)
    } else {
        Finding::good("huge pages", "transparent huge pages are on")
    };
    vec![
        net,
        device(
            "vhost",
            "/dev/vhost-net",
            "quicker networks on taps: `modprobe vhost_net`, and the right to open it",
        ),
        device(
            "VFIO",
            "/dev/vfio/vfio",
            "needed for passing devices through: `modprobe vfio-pci`",
        ),
        iommu,
        cgroups,
        huge,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_part_is_said_with_its_remedy() {
        let config = Config {
            vmm_program: Some("/no/such/vmm".into()),
            ..Config::default()
        };
        let all = parts(&config);
        let vmm = all.first().unwrap();
        assert_eq!(vmm.verdict, Verdict::Bad);
        assert!(vmm.said.contains("/no/such/vmm"), "{}", vmm.said);
        assert!(
            vmm.remedy.as_deref().unwrap().contains("cargo build"),
            "{:?}",
            vmm.remedy
        );
        assert!(vmm.line().starts_with("BAD "));
    }
}
