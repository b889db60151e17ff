//! Who a container's process is, by the root's own /etc/passwd and /etc/group.

use thiserror::Error;

use crate::values::UserWord;

/// The root's lists; empty where it has none.
#[derive(Debug, Clone, Default)]
pub struct UserLists {
    /// `/etc/passwd`
    pub passwd: String,
    /// `/etc/group`
    pub group: String,
}

/// Numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// Nobody of that name.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UserError {
    /// A user.
    #[error(
        "the image has no user {0:?} in its /etc/passwd; write a number, or make that user in the image"
    )]
    User(String),
    /// A group.
    #[error(
        "the image has no group {0:?} in its /etc/group; write a number, or make that group in the image"
    )]
    Group(String),
}

/// passwd(5), group(5): fields by number.
fn find<'a>(list: &'a str, which: impl Fn(&[&str]) -> bool + 'a) -> Option<Vec<&'a str>> {
    let lines = list
        .lines()
        .map(|line| line.trim().split(':').collect::<Vec<_>>());
    lines
        .filter(|fields| fields.len() >= 4)
        .find(|fields| which(fields))
}

fn number(field: Option<&&str>) -> Option<u32> {
    field.and_then(|text| text.parse().ok())
}

/// Resolves. A number needs no entry; one that has an entry gets its groups.
pub fn who(word: Option<&UserWord>, lists: &UserLists) -> Result<Who, UserError> {
    let root = UserWord {
        user: "0".into(),
        group: None,
    };
    let word = word.unwrap_or(&root);
    let id: Option<u32> = word.user.parse().ok();
    let entry = find(&lists.passwd, |fields| match id {
        Some(id) => number(fields.get(2)) == Some(id),
        None => fields.first() == Some(&word.user.as_str()),
    });
    let uid = id.or_else(|| entry.as_ref().and_then(|fields| number(fields.get(2))));
    let uid = uid.ok_or_else(|| UserError::User(word.user.clone()))?;
    let name = entry.as_ref().and_then(|fields| fields.first().copied());
    let primary = entry
        .as_ref()
        .and_then(|fields| number(fields.get(3)))
        .unwrap_or(0);
    let (gid, groups) = match &word.group {
        Some(group) => (group_id(group, lists)?, Vec::new()),
        None => (primary, further(name, primary, lists)),
    };
    Ok(Who { uid, gid, groups })
}

fn group_id(word: &str, lists: &UserLists) -> Result<u32, UserError> {
    if let Ok(gid) = word.parse() {
        return Ok(gid);
    }
    let entry = find(&lists.group, |fields| fields.first() == Some(&word));
    entry
        .and_then(|fields| number(fields.get(2)))
        .ok_or_else(|| UserError::Group(word.to_owned()))
}

fn further(name: Option<&str>, primary: u32, lists: &UserLists) -> Vec<u32> {
    let Some(name) = name else { return Vec::new() };
    let lines = lists
        .group
        .lines()
        .map(|line| line.trim().split(':').collect::<Vec<_>>());
    let named = lines.filter(|fields| {
        fields
            .get(3)
            .is_some_and(|users| users.split(',').any(|user| user == name))
    });
    let mut groups: Vec<u32> = named.filter_map(|fields| number(fields.get(2))).collect();
    if !groups.contains(&primary) {
        groups.insert(0, primary);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists() -> UserLists {
        UserLists {
            passwd: "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33::/:/bin/false\n".into(),
            group: "root:x:0:\nwww:x:33:\nadm:x:4:www,other\n".into(),
        }
    }

    fn of(word: &str) -> Result<Who, UserError> {
        who(Some(&word.parse().unwrap()), &lists())
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(
            of("www"),
            Ok(Who {
                uid: 33,
                gid: 33,
                groups: vec![33, 4]
            })
        );
        assert_eq!(of("33"), of("www"));
        assert_eq!(
            of("1000"),
            Ok(Who {
                uid: 1000,
                gid: 0,
                groups: vec![]
            })
        );
        assert_eq!(
            of("www:adm"),
            Ok(Who {
                uid: 33,
                gid: 4,
                groups: vec![]
            })
        );
        assert_eq!(of("ghost"), Err(UserError::User("ghost".into())));
        assert_eq!(of("0:ghost"), Err(UserError::Group("ghost".into())));
        assert_eq!(who(None, &UserLists::default()), Ok(Who::default()));
    }
}
