//! Storages that belong to the sandbox rather than to one container.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_string, fspick};
use testudo_agent_protocol::{
    AddStorageRequest, AddStorageResponse, RemoveStorageResponse, ResizeStorageRequest,
    ResizeStorageResponse, StatStorageRequest, StatStorageResponse, code,
};

use crate::agent::Agent;
use crate::failure::{During, Failure};
use crate::rpc::ReplyTo;
use crate::storage::{self, Mounted, Roots, check_id};

/// `TMPFS_MAGIC`, `HUGETLBFS_MAGIC`: include/uapi/linux/magic.h
const TMPFS: i64 = 0x0102_1994;

pub(super) fn add(agent: &mut Agent, to: ReplyTo, request: AddStorageRequest) {
    let storage = request.storage.unwrap_or_default();
    let roots = match check(agent, &storage.id) {
        Ok(roots) => roots,
        Err(failure) => return agent.refuse(to, failure),
    };
    let (state, devices) = (agent.state.clone(), Arc::clone(&agent.devices));
    let id = storage.id.clone();
    agent.by_job::<AddStorageRequest, _>(
        to,
        "storage",
        move || storage::mount(&storage, &roots, &state, &devices),
        move |agent, mounted| {
            agent.storages.insert(id, mounted);
            Ok(AddStorageResponse {})
        },
    );
}

fn check(agent: &Agent, id: &str) -> Result<Roots, Failure> {
    check_id("storage", id)?;
    if agent.storages.contains_key(id) {
        return Err(Failure::of(
            code::EXISTS,
            format!("there is a storage {id} already"),
        ));
    }
    agent
        .storages
        .iter()
        .map(|(id, storage)| Ok((id.clone(), storage.view()?)))
        .collect()
}

pub(super) fn remove(agent: &mut Agent, id: &str) -> Result<RemoveStorageResponse, Failure> {
    if agent
        .containers
        .values()
        .any(|c| c.storages.iter().any(|s| s == id))
    {
        let what = format!("storage {id} belongs to a container and goes with it");
        return Err(Failure::wrong_state(what));
    }
    agent.storages.remove(id).ok_or_else(|| none(id))?;
    Ok(RemoveStorageResponse {})
}

fn none(id: &str) -> Failure {
    Failure::not_found(format!("there is no storage {id:?}"))
}

pub(super) fn resize(
    agent: &Agent,
    request: &ResizeStorageRequest,
) -> Result<ResizeStorageResponse, Failure> {
    let storage = agent
        .storages
        .get(&request.id)
        .ok_or_else(|| none(&request.id))?;
    let about = || format!("resize storage {}", request.id);
    let kind = rustix::fs::fstatfs(storage.root()).during(about)?.f_type;
    if kind != TMPFS {
        return Err(Failure::of(
            code::UNIMPLEMENTED,
            format!(
                "storage {} is no tmpfs, and only these are resized here",
                request.id
            ),
        ));
    }
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(storage.root(), "", flags).during(about)?;
    fsconfig_set_string(&context, "size", request.bytes.to_string()).during(about)?;
    fsconfig_reconfigure(&context).during(about)?;
    Ok(ResizeStorageResponse {})
}

pub(super) fn stat(agent: &mut Agent, to: ReplyTo, id: &str) {
    let root = agent
        .storages
        .get(id)
        .ok_or_else(|| none(id))
        .and_then(Mounted::view);
    match root {
        Ok(root) => {
            agent.by_job::<StatStorageRequest, _>(to, "stat", move || figures(&root), |_, r| Ok(r));
        }
        Err(failure) => agent.refuse(to, failure),
    }
}

fn figures(root: &OwnedFd) -> Result<StatStorageResponse, Failure> {
    let stat = rustix::fs::fstatvfs(root).during(|| "ask a file system for its figures".into())?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok(StatStorageResponse {
        bytes: bytes(stat.f_blocks),
        free_bytes: bytes(stat.f_bfree),
        available_bytes: bytes(stat.f_bavail),
        inodes: stat.f_files,
        free_inodes: stat.f_ffree,
    })
}
