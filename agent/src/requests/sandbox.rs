//! The pod: what its containers share, and its end.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, OFlags, ResolveFlags};
use rustix::mount::{MoveMountFlags, move_mount};
use testudo_agent_protocol::{
    Bind, CreateSandboxRequest, CreateSandboxResponse, DestroySandboxRequest,
    DestroySandboxResponse, Dns, SetDnsResponse, SetHostnameResponse, Storage, bind, code, storage,
};

use crate::agent::Agent;
use crate::devices::Devices;
use crate::failure::{During, Failure};
use crate::rpc::ReplyTo;
use crate::stage::make_filesystem;
use crate::stage::options::Options;
use crate::storage::{Mounted, Roots, check_id};

/// The storage that has what containers share: `resolv.conf`, `hosts`, `hostname`, `shm`.
pub(crate) const STORAGE: &str = "sandbox";
const DEFAULT_SHM: u64 = 64 << 20;

/// The pod.
pub(crate) struct Sandbox {
    id: String,
}

pub(super) fn create(agent: &mut Agent, to: ReplyTo, request: CreateSandboxRequest) {
    if let Err(failure) = check(agent, &request) {
        return agent.refuse(to, failure);
    }
    // From here on there is one: a second request while the first is carried out is refused.
    agent.sandbox = Some(Sandbox {
        id: request.id.clone(),
    });
    let (state, devices) = (agent.state.clone(), Arc::clone(&agent.devices));
    agent.by_job::<CreateSandboxRequest, _>(
        to,
        "sandbox",
        move || Ok(set_up(&request, &state, &devices)),
        |agent, mounted| match mounted {
            Ok(mounted) => {
                agent.storages.extend(mounted);
                Ok(CreateSandboxResponse {})
            }
            Err(failure) => {
                agent.forget_sandbox();
                Err(failure)
            }
        },
    );
}

fn check(agent: &Agent, request: &CreateSandboxRequest) -> Result<(), Failure> {
    check_id("sandbox", &request.id)?;
    if let Some(sandbox) = &agent.sandbox {
        let what = format!("this guest is sandbox {} already", sandbox.id);
        return Err(Failure::of(code::EXISTS, what));
    }
    if let Some(module) = request.modules.first() {
        return Err(Failure::of(
            code::UNIMPLEMENTED,
            format!("cannot load module {}: this agent loads none", module.name),
        ));
    }
    for storage in &request.storages {
        check_id("storage", &storage.id)?;
        if agent.storages.contains_key(&storage.id) || storage.id == STORAGE {
            let what = format!("there is a storage {} already", storage.id);
            return Err(Failure::of(code::EXISTS, what));
        }
    }
    Ok(())
}

fn set_up(
    request: &CreateSandboxRequest,
    state: &Path,
    devices: &Devices,
) -> Result<Vec<(String, Mounted)>, Failure> {
    let shared = state.join(STORAGE);
    fs::create_dir_all(shared.join("shm")).during(|| "make the sandbox's folder".into())?;
    let shm = match request.shm_bytes {
        0 => DEFAULT_SHM,
        bytes => bytes,
    };
    let words = ["mode=1777".to_owned(), format!("size={shm}")];
    let tmpfs = make_filesystem("tmpfs", "shm", &Options::read(&words))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tmpfs, "", CWD, shared.join("shm"), flags).during(|| "mount /dev/shm".into())?;
    set_sysctls(request)?;
    if !request.hostname.is_empty() {
        set_hostname(&request.hostname)?;
    }
    for (file, text) in [
        ("hostname", format!("{}\n", request.hostname)),
        ("hosts", hosts(&request.hostname)),
    ] {
        fs::write(shared.join(file), text).during(|| format!("write {file}"))?;
    }
    write_dns(&shared, &request.dns.clone().unwrap_or_default())?;
    let path = shared.to_string_lossy().into_owned();
    let own = Storage {
        id: STORAGE.into(),
        driver: Some(storage::Driver::Bind(Bind {
            of: Some(bind::Of::Path(path)),
        })),
        ..Storage::default()
    };
    let mut roots = Roots::new();
    let mut all = Vec::new();
    for storage in [&own].into_iter().chain(&request.storages) {
        let mounted = crate::storage::mount(storage, &roots, state, devices)?;
        roots.insert(storage.id.clone(), mounted.view()?);
        all.push((storage.id.clone(), mounted));
    }
    Ok(all)
}

fn hosts(hostname: &str) -> String {
    let own = if hostname.is_empty() {
        String::new()
    } else {
        format!("127.0.1.1\t{hostname}\n")
    };
    format!(
        "127.0.0.1\tlocalhost\n{own}::1\tlocalhost ip6-localhost ip6-loopback\n\
         ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    )
}

fn set_sysctls(request: &CreateSandboxRequest) -> Result<(), Failure> {
    let root = rustix::fs::open("/proc/sys", OFlags::PATH | OFlags::CLOEXEC, 0.into());
    let root = root.during(|| "open /proc/sys".into())?;
    for (key, value) in &request.sysctl {
        let about = || format!("set sysctl {key} to {value}");
        let file = rustix::fs::openat2(
            &root,
            key.replace('.', "/"),
            OFlags::WRONLY | OFlags::CLOEXEC,
            0.into(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )
        .during(about)?;
        rustix::io::write(&file, value.as_bytes()).during(about)?;
    }
    Ok(())
}

pub(super) fn set_hostname(name: &str) -> Result<SetHostnameResponse, Failure> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
        return Err(Failure::invalid(format!("{name:?} is no host name")));
    }
    rustix::system::sethostname(name.as_bytes()).during(|| format!("set hostname {name}"))?;
    Ok(SetHostnameResponse {})
}

pub(super) fn set_dns(agent: &Agent, dns: &Dns) -> Result<SetDnsResponse, Failure> {
    write_dns(&agent.state.join(STORAGE), dns)?;
    Ok(SetDnsResponse {})
}

fn write_dns(folder: &Path, dns: &Dns) -> Result<(), Failure> {
    let text = resolv_conf(dns)?;
    // In place: it is a file that containers have mounted.
    fs::write(folder.join("resolv.conf"), text).during(|| "write resolv.conf".into())
}

/// resolv.conf(5). Whatever could begin another line is refused.
fn resolv_conf(dns: &Dns) -> Result<String, Failure> {
    let mut text = String::new();
    for server in &dns.servers {
        let address: std::net::IpAddr = server
            .split('%')
            .next()
            .unwrap_or_default()
            .parse()
            .map_err(|_| Failure::invalid(format!("{server:?} is no address of a name server")))?;
        if address.is_ipv4() && server.contains('%') || !plain(server) {
            return Err(Failure::invalid(format!(
                "{server:?} is no address of a name server"
            )));
        }
        text.push_str(&format!("nameserver {server}\n"));
    }
    for (key, words) in [("search", &dns.searches), ("options", &dns.options)] {
        if let Some(bad) = words.iter().find(|word| !plain(word)) {
            return Err(Failure::invalid(format!(
                "{bad:?} is no word of {key} in resolv.conf"
            )));
        }
        if !words.is_empty() {
            text.push_str(&format!("{key} {}\n", words.join(" ")));
        }
    }
    Ok(text)
}

fn plain(word: &str) -> bool {
    !word.is_empty()
        && word
            .chars()
            .all(|c| c.is_ascii_graphic() && c != '#' && c != ';')
}

/// Kills everything, unmounts everything, answers, and ends the agent.
pub(super) fn destroy(agent: &mut Agent, to: ReplyTo) {
    let groups: Vec<_> = agent
        .containers
        .values()
        .filter_map(|container| container.group.clone())
        .collect();
    agent.by_job::<DestroySandboxRequest, _>(
        to,
        "destroy",
        move || {
            for group in groups {
                group.remove()?;
            }
            rustix::fs::sync();
            Ok(())
        },
        |agent, ()| {
            let ids: Vec<String> = agent.containers.keys().cloned().collect();
            for id in ids {
                agent.forget_container(&id);
            }
            agent.forget_sandbox();
            agent.ending = true;
            Ok(DestroySandboxResponse {})
        },
    );
}

impl Agent {
    /// What a service leaves behind is nothing; a guest that powers off need not tidy up.
    pub(crate) fn end(&mut self) {
        let groups = self
            .containers
            .values()
            .filter_map(|container| container.group.clone());
        for group in groups.collect::<Vec<_>>() {
            if let Err(failure) = group.remove() {
                log::warn!("{failure}");
            }
        }
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.forget_container(&id);
        }
        self.forget_sandbox();
        let program = self.state.join("agent");
        let _ = rustix::mount::unmount(&program, rustix::mount::UnmountFlags::DETACH);
        let _ = fs::remove_file(&program);
    }

    /// Storages go, the last first where one is on another; then what containers shared.
    pub(crate) fn forget_sandbox(&mut self) {
        while self.storages.pop_last().is_some() {}
        if self.sandbox.take().is_some() {
            let shm = self.state.join(STORAGE).join("shm");
            let flags = rustix::mount::UnmountFlags::DETACH;
            if let Err(e) = rustix::mount::unmount(&shm, flags) {
                log::warn!("cannot unmount {}: {}", shm.display(), io::Error::from(e));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_and_searches_are_each_where_they_belong() {
        let dns = Dns {
            servers: vec!["10.0.0.53".into(), "fe80::1%eth0".into()],
            searches: vec!["ns.svc.cluster.local".into(), "example".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "nameserver 10.0.0.53\nnameserver fe80::1%eth0\n\
             search ns.svc.cluster.local example\noptions ndots:5\n"
        );
    }

    #[test]
    fn no_word_becomes_a_line() {
        for bad in ["a\nnameserver 6.6.6.6", "", "a b", "#"] {
            let dns = Dns {
                searches: vec![bad.into()],
                ..Dns::default()
            };
            assert!(resolv_conf(&dns).is_err(), "{bad:?}");
        }
        for bad in [
            "nameserver 1.1.1.1",
            "1.1.1.1\n",
            "example.org",
            "1.1.1.1%eth0",
            "fe80::1%a b",
        ] {
            let dns = Dns {
                servers: vec![bad.into()],
                ..Dns::default()
            };
            assert!(resolv_conf(&dns).is_err(), "{bad:?}");
        }
    }
}
