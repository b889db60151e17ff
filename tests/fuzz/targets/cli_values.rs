//! What people write for `testudo`: values of flags, files of variables, the configuration, seccomp profiles.
//! The first byte says which.
#![no_main]

use std::fmt::Display;
use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use testudo_cli::config;
use testudo_cli::container::{UserLists, capabilities, profile, who};
use testudo_cli::pod::SeccompPlan;
use testudo_cli::values::{
    Cpus, Detach, EnvWord, KeyValue, NetWord, PodName, Publish, SecurityOption, Signal, Size,
    Tmpfs, Ulimit, UserWord, Volume,
};

/// What is shown reads back as what it is.
fn round_trip<T: FromStr + Display + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let again = value.to_string().parse::<T>();
        assert!(again.is_ok_and(|again| again == value), "{value}");
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((which, rest)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(rest) else {
        return;
    };
    match which % 16 {
        0 => round_trip::<Size>(text),
        1 => round_trip::<Cpus>(text),
        2 => drop(text.parse::<Signal>()),
        3 => drop(text.parse::<Ulimit>()),
        4 => {
            if let Ok(volume) = text.parse::<Volume>() {
                assert!(
                    volume.destination.starts_with('/') && !volume.destination.contains("/../")
                );
            }
        }
        5 => drop(text.parse::<Tmpfs>()),
        6 => drop(text.parse::<Publish>()),
        7 => drop(text.parse::<NetWord>()),
        8 => drop((
            text.parse::<PodName>(),
            text.parse::<KeyValue>(),
            text.parse::<Detach>(),
        )),
        9 => drop((text.parse::<SecurityOption>(), text.parse::<EnvWord>())),
        10 => drop(EnvWord::read_file(text)),
        11 => drop(config::parse(text)),
        12 => drop(profile(
            &SeccompPlan::Profile(text.into()),
            &["CAP_SYS_ADMIN".into()],
        )),
        13 => drop(capabilities(&[text.into()], &["ALL".into()])),
        14 => {
            let lists = UserLists {
                passwd: text.into(),
                group: text.into(),
            };
            let user: Option<UserWord> = text.lines().next().and_then(|line| line.parse().ok());
            drop(who(user.as_ref(), &lists));
        }
        _ => drop(config::nearest(text)),
    }
});
