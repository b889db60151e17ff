//! Files into and out of storages and containers' roots, a piece at a time.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use testudo_agent_protocol::write_file_request::Kind;
use testudo_agent_protocol::{
    FilePlace, ReadFileRequest, ReadFileResponse, WriteFileRequest, WriteFileResponse, file_place,
};

use crate::agent::Agent;
use crate::failure::{During, Failure};
use crate::rpc::ReplyTo;
use crate::storage::open_beneath;

/// Bytes in one answer.
const MOST: u32 = 1 << 20;

/// A root, and a path in it.
fn place(agent: &mut Agent, place: Option<FilePlace>) -> Result<(OwnedFd, String), Failure> {
    match place.and_then(|place| place.of) {
        Some(file_place::Of::Storage(place)) => {
            let storage = agent.storages.get(&place.storage).ok_or_else(|| {
                Failure::not_found(format!("there is no storage {:?}", place.storage))
            })?;
            Ok((storage.view()?, place.path))
        }
        Some(file_place::Of::Container(place)) => {
            let init = agent.container(&place.container)?.init;
            let process = agent.process(init)?;
            let pid = process
                .pid
                .filter(|_| process.exit.is_none())
                .ok_or_else(|| {
                    Failure::wrong_state(format!("container {} does not run", place.container))
                })?;
            let root = format!("/proc/{}/root", pid.as_raw_nonzero());
            let root = rustix::fs::open(&root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .during(|| format!("open the root of container {}", place.container))?;
            Ok((root, place.path))
        }
        None => Err(Failure::invalid("a request that names no place")),
    }
}

pub(super) fn write(agent: &mut Agent, to: ReplyTo, mut request: WriteFileRequest) {
    match place(agent, request.place.take()) {
        Ok((root, path)) => agent.by_job::<WriteFileRequest, _>(
            to,
            "write",
            move || write_file(&root, &path, &request),
            |_, ()| Ok(WriteFileResponse {}),
        ),
        Err(failure) => agent.refuse(to, failure),
    }
}

fn write_file(root: &OwnedFd, path: &str, request: &WriteFileRequest) -> Result<(), Failure> {
    let about = || format!("write {path}");
    let trimmed = path.trim_matches('/');
    let (folder, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
    if matches!(name, "" | "." | "..") {
        return Err(Failure::invalid(format!("{path:?} names no file")));
    }
    let folder = open_beneath(root, folder, OFlags::PATH | OFlags::DIRECTORY).during(about)?;
    let mode = Mode::from_raw_mode(request.mode & 0o7777);
    let made = match request.kind() {
        Kind::Directory => match rustix::fs::mkdirat(&folder, name, mode) {
            Err(Errno::EXIST) => return Ok(()),
            made => made.map(|()| None),
        },
        Kind::Link => {
            let target = std::str::from_utf8(&request.data)
                .map_err(|_| Failure::invalid("a link leads to what is not UTF-8"))?;
            rustix::fs::symlinkat(target, &folder, name).map(|()| None)
        }
        Kind::File => {
            let mut flags = OFlags::WRONLY
                | OFlags::CREATE
                | OFlags::NOFOLLOW
                | OFlags::CLOEXEC
                | OFlags::NONBLOCK;
            if request.truncate && request.offset == 0 {
                flags |= OFlags::TRUNC;
            }
            rustix::fs::openat(&folder, name, flags, mode).map(Some)
        }
    };
    let file = made.during(about)?;
    if request.offset == 0 {
        let (uid, gid) = (Uid::from_raw(request.uid), Gid::from_raw(request.gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(&folder, name, Some(uid), Some(gid), flags).during(about)?;
        if let Some(file) = &file {
            // The umask has had its way with the mode, and chown(2) with its set-id bits.
            rustix::fs::fchmod(file, mode).during(about)?;
        }
    }
    if let Some(file) = file {
        let file = std::fs::File::from(file);
        if !file.metadata().during(about)?.is_file() {
            return Err(Failure::invalid(format!("{path} is no regular file")));
        }
        file.write_all_at(&request.data, request.offset)
            .during(about)?;
    }
    Ok(())
}

pub(super) fn read(agent: &mut Agent, to: ReplyTo, request: ReadFileRequest) {
    match place(agent, request.place.clone()) {
        Ok((root, path)) => agent.by_job::<ReadFileRequest, _>(
            to,
            "read",
            move || read_file(&root, &path, &request),
            |_, answer| Ok(answer),
        ),
        Err(failure) => agent.refuse(to, failure),
    }
}

fn read_file(
    root: &OwnedFd,
    path: &str,
    request: &ReadFileRequest,
) -> Result<ReadFileResponse, Failure> {
    let about = || format!("read {path}");
    // Not to wait for the other end of a pipe that a container put there.
    let file = open_beneath(root, path, OFlags::RDONLY | OFlags::NONBLOCK).during(about)?;
    let file = std::fs::File::from(file);
    let metadata = file.metadata().during(about)?;
    if !metadata.is_file() {
        return Err(Failure::invalid(format!("{path} is no regular file")));
    }
    let length = usize::try_from(request.length.min(MOST)).unwrap_or_default();
    let mut data = vec![0; length];
    let mut done = 0;
    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = request
            .offset
            .saturating_add(u64::try_from(done).unwrap_or_default());
        match file.read_at(rest, at).during(about)? {
            0 => break,
            length => done = done.saturating_add(length),
        }
    }
    data.truncate(done);
    Ok(ReadFileResponse {
        data,
        size: metadata.len(),
    })
}
