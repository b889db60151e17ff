//! `testudo cp`: files and folders, through the agent.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use testudo_agent_protocol::write_file_request::Kind;
use testudo_agent_protocol::{
    Client, ContainerPath, FilePlace, ReadFileRequest, WriteFileRequest, file_place,
};

use super::Context;
use crate::args::CpArgs;
use crate::container::CONTAINER;
use crate::guest::Guest;
use crate::state::find;

/// Bytes in one request.
const PIECE: usize = 1 << 20;

pub(super) fn cp(context: &Context, args: &CpArgs) -> anyhow::Result<ExitCode> {
    match (inside(&args.source), inside(&args.destination)) {
        (None, Some((pod, path))) => {
            let source = Path::new(&args.source);
            let name = source
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            let to = match name {
                Some(name) if path.ends_with('/') => format!("{path}{name}"),
                _ => path.to_owned(),
            };
            put(&mut client(context, pod)?, source, &to)?;
        }
        (Some((pod, path)), None) => {
            let mut to = PathBuf::from(&args.destination);
            if to.is_dir() {
                to.push(
                    Path::new(path)
                        .file_name()
                        .context("the source is a pod's root; name a file")?,
                );
            }
            get(&mut client(context, pod)?, path, &to)?;
        }
        _ => bail!(
            "one of {:?} and {:?} must be POD:PATH, the other a path of this machine",
            args.source,
            args.destination
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// `POD:PATH`; what has a slash before its colon is a path of this machine.
fn inside(word: &str) -> Option<(&str, &str)> {
    word.split_once(':')
        .filter(|(pod, _)| !pod.is_empty() && !pod.contains('/') && !pod.starts_with('.'))
}

fn client(context: &Context, pod: &str) -> anyhow::Result<Client<UnixStream>> {
    let entry = find(&context.directories, pod)?;
    Ok(Guest::of(&context.directories.sockets(&entry.pod.id)).connect()?)
}

fn place(path: &str) -> FilePlace {
    let path = ContainerPath {
        container: CONTAINER.into(),
        path: path.into(),
    };
    FilePlace {
        of: Some(file_place::Of::Container(path)),
    }
}

fn put(client: &mut Client<UnixStream>, source: &Path, to: &str) -> anyhow::Result<()> {
    let about = || format!("cannot read {}", source.display());
    let metadata = fs::symlink_metadata(source).with_context(about)?;
    let request = |kind: Kind, data: Vec<u8>| WriteFileRequest {
        place: Some(place(to)),
        kind: kind.into(),
        mode: metadata.mode() & 0o7777,
        data,
        ..WriteFileRequest::default()
    };
    if metadata.is_dir() {
        client.call(&request(Kind::Directory, Vec::new()))?;
        for entry in fs::read_dir(source).with_context(about)? {
            let entry = entry.with_context(about)?;
            let name = entry.file_name();
            put(
                client,
                &entry.path(),
                &format!("{}/{}", to.trim_end_matches('/'), name.to_string_lossy()),
            )?;
        }
        return Ok(());
    }
    if metadata.is_symlink() {
        use std::os::unix::ffi::OsStringExt;
        let target = fs::read_link(source).with_context(about)?;
        client.call(&request(Kind::Link, target.into_os_string().into_vec()))?;
        return Ok(());
    }
    let mut file = File::open(source).with_context(about)?;
    let mut offset = 0_u64;
    loop {
        let mut data = Vec::new();
        Read::by_ref(&mut file)
            .take(u64::try_from(PIECE)?)
            .read_to_end(&mut data)
            .with_context(about)?;
        if data.is_empty() && offset > 0 {
            return Ok(());
        }
        let length = u64::try_from(data.len())?;
        client.call(&WriteFileRequest {
            offset,
            truncate: offset == 0,
            ..request(Kind::File, data)
        })?;
        offset = offset.saturating_add(length);
        if length == 0 {
            return Ok(());
        }
    }
}

fn get(client: &mut Client<UnixStream>, path: &str, to: &Path) -> anyhow::Result<()> {
    let about = || format!("cannot write {}", to.display());
    let mut offset = 0_u64;
    let length = u32::try_from(PIECE)?;
    let mut file: Option<File> = None;
    loop {
        // The first answer decides whether there is anything to write.
        let answer = client.call(&ReadFileRequest {
            place: Some(place(path)),
            offset,
            length,
        })?;
        let out = match &mut file {
            Some(file) => file,
            none => {
                let new = File::create(to).with_context(about)?;
                new.set_permissions(fs::Permissions::from_mode(0o644))
                    .with_context(about)?;
                none.insert(new)
            }
        };
        out.write_all(&answer.data).with_context(about)?;
        offset = offset.saturating_add(u64::try_from(answer.data.len())?);
        if answer.data.is_empty() || offset >= answer.size {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_before_the_first_colon() {
        assert_eq!(inside("web:/etc/x"), Some(("web", "/etc/x")));
        assert_eq!(inside("./a:b"), None);
        assert_eq!(inside("/a:b"), None);
        assert_eq!(inside("file"), None);
    }
}
