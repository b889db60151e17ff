//! Debian's docker-registry on loopback, with TLS and passwords, and a proxy before it that cuts
//! connections and changes bytes.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::panic,
    reason = "tests may"
)]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Bench, Layout, Tar, erofs, fsck, tree};
use testudo_image::registry::{Credentials, RegistryError};
use testudo_image::{Digest, Event, Image, Options, PullError, PullPolicy, Silent, Source};

/// A registry that ends with the test.
struct Registry {
    child: Child,
    port: u16,
    storage: PathBuf,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts one in `dir`; without the program that is said, and there is none.
fn registry(dir: &Path, tls_and_password: bool) -> Option<Registry> {
    for program in ["docker-registry", "htpasswd", "openssl"] {
        if Command::new(program).arg("--help").output().is_err() {
            eprintln!("SKIP registry: {program} is not installed (cargo xtask setup installs it)");
            return None;
        }
    }
    let storage = dir.join("registry");
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut yaml = format!(
        "version: 0.1\nlog: {{ level: error }}\nstorage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp:\n  addr: 127.0.0.1:{port}\n",
        storage.display()
    );
    if tls_and_password {
        let run = |command: &mut Command| {
            let done = command.output().unwrap();
            assert!(
                done.status.success(),
                "{}",
                String::from_utf8_lossy(&done.stderr)
            );
            done.stdout
        };
        let (key, certificate, passwords) = (
            dir.join("key.pem"),
            dir.join("cert.pem"),
            dir.join("htpasswd"),
        );
        // An authority, and what it signs.
        let script = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem
            openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 \
                -keyout key.pem -out request.pem
            openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -copy_extensions copy -out cert.pem";
        run(Command::new("sh").args(["-ec", script]).current_dir(dir));
        let line = run(Command::new("htpasswd").args(["-nbB", "-C", "4", "me", "secret"]));
        fs::write(&passwords, line).unwrap();
        yaml += &format!(
            "  tls: {{ certificate: {}, key: {} }}\n",
            certificate.display(),
            key.display()
        );
        yaml += &format!(
            "auth: {{ htpasswd: {{ realm: test, path: {} }} }}\n",
            passwords.display()
        );
    }
    let file = dir.join("registry.yml");
    fs::write(&file, yaml).unwrap();
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let registry = Registry {
        child,
        port,
        storage,
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "the registry does not listen");
        std::thread::sleep(Duration::from_millis(50));
    }
    Some(registry)
}

impl Registry {
    /// Puts an image into the files behind the registry, as a push would have.
    fn push(&self, layout: &Layout, name: &str, tag: &str) {
        let root = self.storage.join("docker/registry/v2");
        let link = |path: PathBuf, digest: &Digest| {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("link"), digest.to_string()).unwrap();
        };
        let repository = root.join("repositories").join(name);
        for entry in fs::read_dir(layout.dir.join("blobs/sha256")).unwrap() {
            let entry = entry.unwrap();
            let hex = entry.file_name().into_string().unwrap();
            let blob = self.blob(&hex);
            fs::create_dir_all(blob.parent().unwrap()).unwrap();
            fs::copy(entry.path(), blob).unwrap();
            let digest: Digest = format!("sha256:{hex}").parse().unwrap();
            link(repository.join("_layers/sha256").join(&hex), &digest);
        }
        let hex = layout.manifest.hex();
        link(
            repository.join("_manifests/revisions/sha256").join(hex),
            &layout.manifest,
        );
        link(
            repository.join("_manifests/tags").join(tag).join("current"),
            &layout.manifest,
        );
        link(
            repository
                .join("_manifests/tags")
                .join(tag)
                .join("index/sha256")
                .join(hex),
            &layout.manifest,
        );
    }

    fn blob(&self, hex: &str) -> PathBuf {
        self.storage
            .join("docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn sample() -> [Vec<u8>; 2] {
    let passwd = "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/srv:/bin/sh\n";
    [
        Tar::new()
            .file("etc/passwd", passwd.as_bytes())
            .file("big", &noise(3 << 20))
            .bytes(),
        Tar::new()
            .file("etc/.wh.nothing", b"")
            .file("top", b"1")
            .bytes(),
    ]
}

/// Quick, and blind to the credentials of whoever runs the tests.
fn options(bench: &Bench) -> Options {
    let mut options = bench.options.clone();
    options.registry.auth_files = Vec::new();
    options.registry.pause = Duration::from_millis(10);
    options.registry.attempts = 3;
    options
}

fn pull(bench: &Bench, options: &Options, word: &str) -> Result<Image, PullError> {
    bench
        .store
        .pull(&Source::parse(word).unwrap(), options, &mut Silent)
}

fn registry_error(result: Result<Image, PullError>) -> RegistryError {
    match result.unwrap_err() {
        PullError::Registry { source, .. } => *source,
        other => panic!("{other}"),
    }
}

#[test]
fn a_registry_with_tls_and_passwords() {
    let bench = Bench::new();
    let Some(registry) = registry(bench.dir.path(), true) else {
        return;
    };
    let layout = bench.layout("image", &sample());
    registry.push(&layout, "team/app", "v1");
    let host = format!("localhost:{}", registry.port);
    let word = format!("{host}/team/app:v1");
    let mut options = options(&bench);

    let error = registry_error(pull(&bench, &options, &word));
    assert!(
        matches!(error, RegistryError::Certificate { .. }),
        "{error}"
    );
    options.registry.authorities = vec![bench.dir.path().join("ca.pem")];
    let error = registry_error(pull(&bench, &options, &word));
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    let credentials = |password: &str| Credentials {
        username: "me".into(),
        password: password.into(),
    };
    options.registry.credentials = Some(credentials("wrong"));
    let error = registry_error(pull(&bench, &options, &word));
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    assert!(bench.store.list().unwrap().is_empty());

    // As Docker keeps them.
    use base64::Engine as _;
    let auth = base64::engine::general_purpose::STANDARD.encode("me:secret");
    let file = bench.dir.path().join("config.json");
    fs::write(
        &file,
        format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#),
    )
    .unwrap();
    options.registry.credentials = None;
    options.registry.auth_files = vec![file];

    let mut events = Vec::new();
    let source = Source::parse(&word).unwrap();
    let image = bench
        .store
        .pull(&source, &options, &mut |event| events.push(event))
        .unwrap();
    fsck(erofs(&image));
    assert_eq!(
        common::names(&tree(erofs(&image))),
        ["big", "etc", "etc/passwd", "top"]
    );
    assert_eq!(
        (image.digest.as_ref(), image.names.as_slice()),
        (Some(&layout.manifest), &[word.clone()][..])
    );
    assert_eq!(image.lookup_user("app").unwrap().uid, 1000);
    assert!(
        matches!(events.first(), Some(Event::Resolved { layers: 2, .. })),
        "{events:?}"
    );
    for layer in &layout.layers {
        let done = |e: &&Event| matches!(e, Event::Downloading { digest, done, total } if digest == layer && done == total);
        assert_eq!(events.iter().filter(done).count(), 1, "{layer}");
    }
    let unpacked = events.iter().filter_map(|e| match e {
        Event::Unpacking {
            layer, layers: 2, ..
        } => Some(*layer),
        _ => None,
    });
    assert!(unpacked.clone().max() == Some(1) && unpacked.count() >= 2);

    // Again: nothing is fetched and nothing unpacked, nor when asked for by digest; nor is the registry
    // asked unless it should be.
    events.clear();
    for word in [word.clone(), format!("{host}/team/app@{}", layout.manifest)] {
        let again = bench
            .store
            .pull(&Source::parse(&word).unwrap(), &options, &mut |event| {
                events.push(event);
            })
            .unwrap();
        assert_eq!(again.rootfs, image.rootfs);
    }
    options.policy = PullPolicy::Always;
    bench
        .store
        .pull(&source, &options, &mut |event| events.push(event))
        .unwrap();
    assert_eq!(events, []);

    let error = registry_error(pull(&bench, &options, &format!("{host}/team/app:v2")));
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    let error = registry_error(pull(&bench, &options, &format!("{host}/nobody/nothing")));
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    drop(registry);
    let error = registry_error(pull(&bench, &options, &word));
    assert!(
        matches!(error, RegistryError::Unreachable { .. }),
        "{error}"
    );
    options.policy = PullPolicy::Missing;
    assert_eq!(pull(&bench, &options, &word).unwrap().rootfs, image.rootfs);
    options.policy = PullPolicy::Never;
    let error = pull(&bench, &options, &format!("{host}/other")).unwrap_err();
    assert!(matches!(error, PullError::NotStored(_)), "{error}");
}

#[test]
fn what_a_registry_sends_is_what_was_asked_for() {
    let bench = Bench::new();
    let Some(registry) = registry(bench.dir.path(), false) else {
        return;
    };
    let layout = bench.layout("image", &sample());
    let options = options(&bench);
    let word = format!("127.0.0.1:{}/app", registry.port);
    registry.push(&layout, "app", "latest");
    let whole = fs::read(registry.blob(layout.layers[0].hex())).unwrap();
    let change = |hex: &str, bytes: &[u8]| fs::write(registry.blob(hex), bytes).unwrap();
    let assert_empty = || {
        assert!(bench.store.list().unwrap().is_empty());
        for folder in ["tmp", "rootfs", "names"] {
            assert_eq!(
                fs::read_dir(bench.store.path().join(folder))
                    .unwrap()
                    .count(),
                0,
                "{folder}"
            );
        }
    };

    let mut flipped = whole.clone();
    flipped[1000] ^= 1;
    change(layout.layers[0].hex(), &flipped);
    let error = registry_error(pull(&bench, &options, &word));
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
    assert_empty();
    change(layout.layers[0].hex(), &whole[..whole.len() - 1000]);
    let error = registry_error(pull(&bench, &options, &word));
    assert!(matches!(error, RegistryError::Cut { .. }), "{error}");
    assert_empty();
    change(layout.layers[0].hex(), &[&whole[..], b"more"].concat());
    let error = registry_error(pull(&bench, &options, &word));
    assert!(matches!(error, RegistryError::Size { .. }), "{error}");
    assert_empty();
    fs::remove_file(registry.blob(layout.layers[0].hex())).unwrap();
    let error = registry_error(pull(&bench, &options, &word));
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    assert_empty();
    change(layout.layers[0].hex(), &whole);

    let manifest = fs::read(registry.blob(layout.manifest.hex())).unwrap();
    change(layout.manifest.hex(), &[&manifest[..], b" "].concat());
    let error = registry_error(pull(
        &bench,
        &options,
        &format!("{word}@{}", layout.manifest),
    ));
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
    assert_empty();
    change(layout.manifest.hex(), &manifest);
    fsck(erofs(&pull(&bench, &options, &word).unwrap()));
}

/// Passes on what the registry says, and of the first `cuts` long answers only the first `bytes`.
fn cutting_proxy(to: u16, cuts: usize, bytes: usize) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let cut = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&cut);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(mut client), Ok(mut server)) = (client, TcpStream::connect(("127.0.0.1", to)))
            else {
                continue;
            };
            let count = Arc::clone(&count);
            let (mut from_client, mut to_server) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from_client, &mut to_server);
                let _ = to_server.shutdown(std::net::Shutdown::Write);
            });
            std::thread::spawn(move || {
                let mut passed = 0;
                let mut buffer = vec![0; 64 << 10];
                while let Ok(n) = server.read(&mut buffer) {
                    if n == 0 || client.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                    passed += n;
                    if passed > bytes && count.fetch_add(1, Ordering::SeqCst) < cuts {
                        break;
                    }
                }
                let _ = client.shutdown(std::net::Shutdown::Both);
                let _ = server.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    (port, cut)
}

#[test]
fn cut_connections_are_continued_and_given_up() {
    let bench = Bench::new();
    let Some(registry) = registry(bench.dir.path(), false) else {
        return;
    };
    let layout = bench.layout("image", &sample());
    registry.push(&layout, "app", "latest");
    let options = options(&bench);

    let (port, _) = cutting_proxy(registry.port, usize::MAX, 100 << 10);
    let word = format!("127.0.0.1:{port}/app");
    let error = registry_error(pull(&bench, &options, &word));
    assert!(
        matches!(error, RegistryError::Cut { attempts: 3, .. }),
        "{error}"
    );
    assert!(bench.store.list().unwrap().is_empty());
    assert_eq!(
        fs::read_dir(bench.store.path().join("tmp"))
            .unwrap()
            .count(),
        0
    );

    let (port, cut) = cutting_proxy(registry.port, 2, 1 << 20);
    let word = format!("127.0.0.1:{port}/app");
    let mut events = Vec::new();
    let image = bench
        .store
        .pull(&Source::parse(&word).unwrap(), &options, &mut |event| {
            events.push(event);
        })
        .unwrap();
    fsck(erofs(&image));
    assert!(cut.load(Ordering::SeqCst) >= 2);
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, Event::Retrying { .. }))
            .count(),
        2
    );
    // It went on where it was: what there is never becomes less.
    let mut most = 0;
    for event in &events {
        if let Event::Downloading { digest, done, .. } = event
            && *digest == layout.layers[0]
        {
            assert!(*done >= most, "{done} after {most}");
            most = *done;
        }
    }
}
