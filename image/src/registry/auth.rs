//! Credentials, where Docker and Podman keep them: `auths`, `credHelpers` and `credsStore` of
//! `config.json`, and the helper programs these name.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

/// Docker's name for its own registry, in files and to helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// A name and a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Who.
    pub username: String,
    /// Secret.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:…", self.username)
    }
}

/// Why credentials that are there cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The file.
    #[error("the credentials in {path} cannot be read: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The program it names.
    #[error("the credential helper {program} failed: {why}")]
    Helper {
        /// Which.
        program: String,
        /// What it said.
        why: String,
    },
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: HashMap<String, Auth>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The files looked at, in order: `$REGISTRY_AUTH_FILE`, Docker's, Podman's.
pub(super) fn files() -> Vec<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let home = variable("HOME");
    let docker = variable("DOCKER_CONFIG").or_else(|| Some(home.as_ref()?.join(".docker")));
    let containers = |base: PathBuf| base.join("containers/auth.json");
    [
        variable("REGISTRY_AUTH_FILE"),
        docker.map(|dir| dir.join("config.json")),
        variable("XDG_RUNTIME_DIR").map(containers),
        home.map(|home| containers(home.join(".config"))),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The first of these files that has credentials for a repository says which.
pub(super) fn find(
    files: &[PathBuf],
    registry: &str,
    repository: &str,
) -> Result<Option<Credentials>, AuthError> {
    for path in files {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => {
                return Err(AuthError::File {
                    path: path.clone(),
                    why: e.to_string(),
                });
            }
        };
        if let Some(found) = in_file(path, &bytes, registry, repository)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn in_file(
    path: &Path,
    bytes: &[u8],
    registry: &str,
    repository: &str,
) -> Result<Option<Credentials>, AuthError> {
    let wrong = |why: String| AuthError::File {
        path: path.into(),
        why,
    };
    let config: Config = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
    let keys = keys(registry, repository);
    let helper = keys.iter().find_map(|key| config.cred_helpers.get(key));
    if let Some(helper) = helper.or(config.creds_store.as_ref().filter(|s| !s.is_empty())) {
        let server = if registry == "docker.io" {
            DOCKER_HUB
        } else {
            registry
        };
        if let Some(found) = ask(helper, server)? {
            return Ok(Some(found));
        }
    }
    let Some(auth) = keys.iter().find_map(|key| config.auths.get(key)) else {
        return Ok(None);
    };
    if let (Some(username), Some(password)) = (&auth.username, &auth.password) {
        return Ok(Some(Credentials {
            username: username.clone(),
            password: password.clone(),
        }));
    }
    let Some(packed) = auth.auth.as_ref().filter(|a| !a.is_empty()) else {
        return Ok(None);
    };
    let pair = STANDARD
        .decode(packed.trim())
        .ok()
        .and_then(|b| String::from_utf8(b).ok());
    match pair.as_deref().and_then(|pair| pair.split_once(':')) {
        Some((username, password)) => Ok(Some(Credentials {
            username: username.to_owned(),
            // Docker of long ago padded it.
            password: password.trim_end_matches('\0').to_owned(),
        })),
        None => Err(wrong(format!(
            "`auth` of {registry} is not base64 of NAME:PASSWORD"
        ))),
    }
}

/// From the repository up to the registry, with and without a scheme.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = repository;
    loop {
        keys.push(format!("{registry}/{path}"));
        match path.rsplit_once('/') {
            Some((parent, _)) => path = parent,
            None => break,
        }
    }
    keys.push(registry.to_owned());
    keys.extend(["https://", "http://"].map(|scheme| format!("{scheme}{registry}")));
    keys.extend(["/v1/", "/v2/"].map(|end| format!("https://{registry}{end}")));
    if registry == "docker.io" {
        keys.extend(
            [DOCKER_HUB, "index.docker.io", "https://index.docker.io/v2/"].map(str::to_owned),
        );
    }
    keys
}

/// `docker-credential-NAME get`, the server on its stdin. `None` if it has nothing.
fn ask(name: &str, server: &str) -> Result<Option<Credentials>, AuthError> {
    let program = format!("docker-credential-{name}");
    let wrong = |why: String| AuthError::Helper {
        program: program.clone(),
        why,
    };
    if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    {
        return Err(wrong("this is not the name of a program".into()));
    }
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| wrong(e.to_string()))?;
    if let Some(mut input) = child.stdin.take() {
        // One that does not read it says why.
        let _ = input.write_all(server.as_bytes());
    }
    let output = child.wait_with_output().map_err(|e| wrong(e.to_string()))?;
    if output.status.success() {
        let answer: Answer =
            serde_json::from_slice(&output.stdout).map_err(|e| wrong(e.to_string()))?;
        // That name means an identity token, with which our client cannot do anything.
        if answer.username == "<token>" {
            return Err(wrong(
                "it has an identity token, which is not supported; log in with a password".into(),
            ));
        }
        return Ok(Some(Credentials {
            username: answer.username,
            password: answer.secret,
        }));
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    match said.contains("credentials not found") {
        true => Ok(None),
        false => Err(wrong(said.trim().chars().take(300).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(json: &str, registry: &str) -> Option<(String, String)> {
        let found = in_file(
            Path::new("config.json"),
            json.as_bytes(),
            registry,
            "team/app",
        )
        .unwrap();
        found.map(|c| (c.username, c.password))
    }

    #[test]
    fn credentials_in_all_forms() {
        let pair = STANDARD.encode("me:a:b");
        let me = Some(("me".to_owned(), "a:b".to_owned()));
        for key in [
            "r.example:5000",
            "https://r.example:5000",
            "https://r.example:5000/v1/",
            "r.example:5000/team",
        ] {
            let json = format!(r#"{{"auths":{{"{key}":{{"auth":"{pair}"}}}}}}"#);
            assert_eq!(look(&json, "r.example:5000"), me, "{key}");
            assert_eq!(look(&json, "r.example"), None, "{key}");
        }
        let hub =
            format!(r#"{{"auths":{{"{DOCKER_HUB}":{{"auth":"{pair}"}}}},"HttpHeaders":{{}}}}"#);
        assert_eq!(look(&hub, "docker.io"), me);
        let near = format!(
            r#"{{"auths":{{"r/team":{{"auth":"{}"}},"r/team/app":{{"auth":"{pair}"}}}}}}"#,
            STANDARD.encode("x:y")
        );
        assert_eq!(look(&near, "r"), me);
        assert_eq!(look(r#"{"auths":{"r":{}}}"#, "r"), None);
    }

    #[test]
    fn what_cannot_be_used_is_said_without_the_secret() {
        let bad = |json: &str| {
            in_file(Path::new("c"), json.as_bytes(), "r", "a")
                .unwrap_err()
                .to_string()
        };
        assert!(bad("{").contains("c cannot be read"));
        assert!(bad(r#"{"auths":{"r":{"auth":"c2VjcmV0"}}}"#).contains("not base64 of NAME"));
        assert!(bad(r#"{"credsStore":"../x"}"#).contains("not the name of a program"));
        assert!(
            bad(r#"{"credHelpers":{"r":"not-there"}}"#).contains("docker-credential-not-there")
        );
        let shown = format!(
            "{:?}",
            Credentials {
                username: "me".into(),
                password: "secret".into()
            }
        );
        assert!(!shown.contains("secret"));
    }
}
