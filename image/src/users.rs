//! `user[:group]` as the image's own `/etc/passwd` and `/etc/group` have it, by the rules of Docker and
//! runc.

use crate::erofs::read::{ReadAt, ReadError, Reader};
use crate::rootfs::{Rootfs, RootfsError};

/// Bytes of either file.
const FILE_MAX: u64 = 16 << 20;

/// Who a process is to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Further groups, ascending.
    pub groups: Vec<u32>,
    /// Name, if the image has one for the id.
    pub name: Option<String>,
    /// Home directory, if the image has one; else `/` is what Docker takes.
    pub home: Option<String>,
    /// Login shell, if the image has one.
    pub shell: Option<String>,
}

/// Who there is not.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// By name only what is in the file can be found.
    #[error("the image has no user `{0}` in /etc/passwd; a number works without")]
    NoUser(String),
    /// The same of groups.
    #[error("the image has no group `{0}` in /etc/group; a number works without")]
    NoGroup(String),
    /// The image.
    #[error("the image's users cannot be read")]
    Read(#[from] RootfsError),
}

impl Rootfs {
    /// Finds `user`, `uid`, `user:group`, …; empty is root.
    pub fn lookup_user(&self, word: &str) -> Result<User, UserError> {
        let passwd = self.read("/etc/passwd", FILE_MAX)?.unwrap_or_default();
        let group = self.read("/etc/group", FILE_MAX)?.unwrap_or_default();
        lookup(
            word,
            &String::from_utf8_lossy(&passwd),
            &String::from_utf8_lossy(&group),
        )
    }
}

/// A small file of an image, `None` if it has none.
pub(crate) fn read_small<S: ReadAt>(
    image: &Reader<S>,
    path: &str,
    max: u64,
) -> Result<Option<Vec<u8>>, ReadError> {
    match image.lookup(path.as_bytes())? {
        Some(inode) => Ok(Some(image.read_whole(&inode, max)?)),
        None => Ok(None),
    }
}

fn lookup(word: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (user, wanted_group) = match word.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (word, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // A name may look like a number: names come first, as in runc.
    let lines = || passwd.lines().filter_map(account);
    let known = lines()
        .find(|a| a.name == user)
        .or_else(|| lines().find(|a| number(user) == Some(a.uid)));
    let mut found = match (known, number(user)) {
        (Some(a), _) => User {
            uid: a.uid,
            gid: a.gid,
            name: Some(a.name.to_owned()),
            home: (!a.home.is_empty()).then(|| a.home.to_owned()),
            shell: (!a.shell.is_empty()).then(|| a.shell.to_owned()),
            groups: Vec::new(),
        },
        (None, Some(uid)) => User {
            uid,
            ..User::default()
        },
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    match wanted_group {
        Some(wanted) => {
            let by_name = group.lines().filter_map(members).find(|g| g.name == wanted);
            found.gid = by_name
                .map(|g| g.gid)
                .or(number(wanted))
                .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?;
        }
        // Who asks for a group gets that one only.
        None => {
            if let Some(name) = &found.name {
                let of = group.lines().filter_map(members);
                found.groups = of
                    .filter(|g| g.members.split(',').any(|m| m == name))
                    .map(|g| g.gid)
                    .collect();
                found.groups.sort_unstable();
                found.groups.dedup();
            }
        }
    }
    Ok(found)
}

struct Account<'l> {
    name: &'l str,
    uid: u32,
    gid: u32,
    home: &'l str,
    shell: &'l str,
}

/// passwd(5)
fn account(line: &str) -> Option<Account<'_>> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let (uid, gid) = (fields.nth(1)?, fields.next()?);
    let home = fields.nth(1).unwrap_or_default();
    Some(Account {
        name,
        uid: number(uid)?,
        gid: number(gid)?,
        home,
        shell: fields.next().unwrap_or_default(),
    })
}

struct Members<'l> {
    name: &'l str,
    gid: u32,
    members: &'l str,
}

/// group(5)
fn members(line: &str) -> Option<Members<'_>> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let gid = number(fields.nth(1)?)?;
    Some(Members {
        name,
        gid,
        members: fields.next().unwrap_or_default(),
    })
}

/// Decimal, without sign; ids end before 2³¹ (as runc has it).
fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits
        .then(|| text.parse().ok())?
        .filter(|n| *n <= i32::MAX.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001:,,,:/srv/app:/bin/false\n77:x:5:5::/:\nnohome:x:8:8:::\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\nweb:x:33:app,www\nvideo:x:44:www,app\n";

    fn ids(word: &str) -> (u32, u32, Vec<u32>) {
        let user = lookup(word, PASSWD, GROUP).unwrap_or_else(|e| panic!("{e}"));
        (user.uid, user.gid, user.groups)
    }

    #[test]
    fn users_as_docker_finds_them() {
        for (word, wanted) in [
            ("", (0, 0, vec![])),
            ("root", (0, 0, vec![])),
            ("app", (1000, 1001, vec![33, 44])),
            ("1000", (1000, 1001, vec![33, 44])),
            ("app:web", (1000, 33, vec![])),
            ("app:", (1000, 1001, vec![33, 44])),
            ("app:99", (1000, 99, vec![])),
            ("4242", (4242, 0, vec![])),
            ("4242:web", (4242, 33, vec![])),
            ("77", (5, 5, vec![])),
            (":web", (0, 33, vec![])),
        ] {
            assert_eq!(ids(word), wanted, "{word}");
        }
        let app = lookup("app", PASSWD, GROUP).unwrap();
        assert_eq!(
            (app.home.as_deref(), app.shell.as_deref()),
            (Some("/srv/app"), Some("/bin/false"))
        );
        assert_eq!(lookup("nohome", PASSWD, GROUP).unwrap().home, None);
    }

    #[test]
    fn who_is_not_there_is_named() {
        for (word, named) in [
            ("bob", "bob"),
            ("app:x", "x"),
            ("-1", "-1"),
            ("4294967295", "4294967295"),
            ("0x1", "0x1"),
        ] {
            let error = lookup(word, PASSWD, GROUP).unwrap_err().to_string();
            assert!(error.contains(&format!("`{named}`")), "{word}: {error}");
        }
    }
}
