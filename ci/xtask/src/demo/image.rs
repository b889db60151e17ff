//! The demo's image: an OCI layout of three layers, made from Debian packages. What is on this machine
//! decides nothing: the packages are fetched and unpacked, never installed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::cache::Cache;
use crate::{debian, sh};

/// Raised when the image changes.
const RECIPE: &[u8] = b"1";
const BUSYBOX: &str = "busybox-static";
/// What the demo calls besides those that busybox's own `--list` gives.
const PAGE: &str = "<h1>Served from inside a virtual machine</h1>\n";

/// Fills the folder of a layer.
type Make<'a> = &'a dyn Fn(&Path) -> Result<()>;

/// The layout's folder.
pub(super) fn build(cache: &Cache) -> Result<PathBuf> {
    let busybox = debian::unpacked(cache, BUSYBOX)?;
    let key = busybox.display().to_string();
    let entry = cache.entry("demo-image", &[key.as_bytes(), RECIPE]);
    entry.get_or_build(|dir| write(&busybox.join("bin/busybox"), dir))
}

fn write(busybox: &Path, dir: &Path) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let make: [Make<'_>; 3] = [&|root| base(busybox, root), &site, &change];
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for (make, number) in make.iter().zip(0..) {
        let root = dir.join(format!("layer-{number}"));
        fs::create_dir(&root)?;
        make(&root)?;
        let tar = dir.join("layer.tar");
        let mut command = Command::new("tar");
        command.args([
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--mtime=@0",
        ]);
        sh::quiet(command.arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."))?;
        diff_ids.push(format!("sha256:{}", digest(&fs::read(&tar)?)));
        sh::quiet(Command::new("gzip").args(["-n", "-9"]).arg(&tar))?;
        let bytes = fs::read(dir.join("layer.tar.gz"))?;
        fs::remove_file(dir.join("layer.tar.gz"))?;
        fs::remove_dir_all(&root)?;
        layers.push(blob(
            &blobs,
            "application/vnd.oci.image.layer.v1.tar+gzip",
            &bytes,
        )?);
    }
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/bin:/bin", "GREETING=hello"],
            "Cmd": ["sh", "-c", "cat /etc/motd"],
            "WorkingDir": "/srv",
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = blob(
        &blobs,
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    )?;
    let media = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({"schemaVersion": 2, "mediaType": media, "config": config, "layers": layers});
    let mut manifest = blob(&blobs, media, manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(dir.join("index.json"), index.to_string())?;
    fs::write(
        dir.join("oci-layout"),
        json!({"imageLayoutVersion": "1.0.0"}).to_string(),
    )?;
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Writes a blob; its descriptor.
fn blob(blobs: &Path, media: &str, bytes: &[u8]) -> Result<serde_json::Value> {
    let name = digest(bytes);
    fs::write(blobs.join(&name), bytes).with_context(|| format!("cannot write blob {name}"))?;
    Ok(json!({"mediaType": media, "digest": format!("sha256:{name}"), "size": bytes.len()}))
}

/// Folders, users, and a shell with its tools.
fn base(busybox: &Path, root: &Path) -> Result<()> {
    for folder in [
        "bin", "etc", "proc", "sys", "dev", "tmp", "root", "srv", "usr/bin",
    ] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nwww:x:33:33::/srv:/bin/sh\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\nwww:x:33:\n")?;
    fs::write(root.join("etc/motd"), "replaced by a later layer\n")?;
    fs::write(root.join("etc/leftover"), "removed by a later layer\n")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    let applets = sh::read(Command::new(busybox).arg("--list"))?;
    for applet in applets.lines().filter(|name| *name != "busybox") {
        symlink("/bin/busybox", root.join("usr/bin").join(applet))?;
    }
    symlink("busybox", root.join("bin/sh"))?;
    Ok(())
}

/// A page to serve.
fn site(root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("srv/www"))?;
    fs::write(root.join("srv/www/index.html"), PAGE)?;
    Ok(())
}

/// Replaces a file and removes another.
fn change(root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("etc"))?;
    fs::write(
        root.join("etc/motd"),
        "Three layers, one virtual machine.\n",
    )?;
    fs::write(root.join("etc/.wh.leftover"), "")?;
    Ok(())
}
