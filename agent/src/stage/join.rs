//! Namespaces: those to join, and those to have anew.

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::Given;
use super::channel::{Channel, Order, Report, Word};
use crate::failure::{During, Failure};
use crate::sys::namespace::unshare;

/// A user namespace comes first, so that the others belong to it.
pub(super) fn enter(order: &Order, given: &Given, channel: &Channel) -> Result<(), Failure> {
    let user = UnshareFlags::NEWUSER.bits();
    let mut joins: Vec<_> = order.joins.iter().zip(&given.joins).collect();
    joins.sort_by_key(|(kind, _)| **kind != user);
    let mut mapped = false;
    for (kind, fd) in joins {
        // Any kind: the descriptor knows what it is.
        move_into_link_name_space(std::os::fd::AsFd::as_fd(fd), None::<LinkNameSpaceType>)
            .during(|| format!("join a namespace of kind {kind:#x}"))?;
        mapped |= *kind == user;
    }
    let anew = UnshareFlags::from_bits_retain(order.unshare);
    if anew.contains(UnshareFlags::NEWUSER) {
        unshare(UnshareFlags::NEWUSER).during(|| "have a user namespace".into())?;
        channel
            .report(&Report::needs_map(), None)
            .during(|| "ask for id maps".into())?;
        channel.await_word(Word::Mapped)?;
        mapped = true;
    }
    if mapped {
        become_root()?;
    }
    unshare(anew.difference(UnshareFlags::NEWUSER)).during(|| "have new namespaces".into())
}

/// Of the user namespace, whose maps may make this process nobody until then.
fn become_root() -> Result<(), Failure> {
    let (uid, gid) = (rustix::process::Uid::ROOT, rustix::process::Gid::ROOT);
    // A namespace may forbid it (setgroups: deny); then there is nothing to drop either.
    let _ = set_thread_groups(&[]);
    set_thread_res_gid(gid, gid, gid).during(|| "become group 0 of the user namespace".into())?;
    set_thread_res_uid(uid, uid, uid).during(|| "become user 0 of the user namespace".into())
}
