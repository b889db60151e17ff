//! ACPI events by generic netlink: the family `acpi_event`, group `acpi_mc_group`
//! (drivers/acpi/event.c, include/uapi/linux/genetlink.h). Works in kernels without evdev.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::netlink;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const ACPI_GENL_ATTR_EVENT: u16 = 1;

/// `struct nlmsghdr` and `struct genlmsghdr`.
const NLMSG: usize = 16;
const GENL: usize = 4;
/// `acpi_genl_event` begins with the device class, zero-terminated.
const DEVICE_CLASS: usize = 20;

/// A subscription.
pub(crate) struct AcpiEvents {
    socket: OwnedFd,
    family: u16,
}

impl AcpiEvents {
    pub(crate) fn open() -> io::Result<AcpiEvents> {
        let socket = netlink::generic_socket()?;
        netlink::send(&socket, &get_family("acpi_event"))?;
        let reply = netlink::receive(&socket)?;
        let (family, group) = family_and_group(&reply)
            .ok_or_else(|| io::Error::other("this kernel has no netlink family acpi_event"))?;
        netlink::join_group(&socket, group)?;
        Ok(AcpiEvents { socket, family })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The device class of the next message (`button/power`), if it is an event.
    pub(crate) fn receive(&mut self) -> io::Result<Option<String>> {
        let message = netlink::receive(&self.socket)?;
        Ok(device_class(&message, self.family))
    }
}

fn get_family(name: &str) -> Vec<u8> {
    let mut value = name.as_bytes().to_vec();
    value.push(0);
    let attribute_length = value.len().saturating_add(4);
    value.resize(value.len().next_multiple_of(4), 0);
    let length = value.len().saturating_add(NLMSG + GENL + 4);
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).unwrap_or(0).to_ne_bytes());
    message.extend(GENL_ID_CTRL.to_ne_bytes());
    message.extend(1_u16.to_ne_bytes()); // NLM_F_REQUEST
    message.extend([0; 8]); // sequence, port
    message.extend([CTRL_CMD_GETFAMILY, 1, 0, 0]);
    message.extend(u16::try_from(attribute_length).unwrap_or(0).to_ne_bytes());
    message.extend(CTRL_ATTR_FAMILY_NAME.to_ne_bytes());
    message.extend(value);
    message
}

/// The attributes (type, value) in a run of them; the flags in a type's top bits are dropped.
fn attributes(mut run: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let Some((&[l0, l1, t0, t1], _)) = run.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(value) = run.get(4..length) else {
            break;
        };
        found.push((u16::from_ne_bytes([t0, t1]) & 0x3fff, value));
        run = run.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn attribute(run: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(run)
        .into_iter()
        .find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// The message's type and its attributes.
fn payload(message: &[u8]) -> Option<(u16, &[u8])> {
    let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
    Some((kind, message.get(NLMSG + GENL..)?))
}

fn family_and_group(reply: &[u8]) -> Option<(u16, u32)> {
    let (GENL_ID_CTRL, run) = payload(reply)? else {
        return None;
    };
    let family = u16::from_ne_bytes(*attribute(run, CTRL_ATTR_FAMILY_ID)?.first_chunk()?);
    // A list of groups, each a run of attributes; this family has one.
    let (_, group) = attributes(attribute(run, CTRL_ATTR_MCAST_GROUPS)?)
        .into_iter()
        .next()?;
    let id = u32::from_ne_bytes(*attribute(group, CTRL_ATTR_MCAST_GRP_ID)?.first_chunk()?);
    Some((family, id))
}

fn device_class(message: &[u8], family: u16) -> Option<String> {
    let (kind, run) = payload(message)?;
    if kind != family {
        return None;
    }
    let event = attribute(run, ACPI_GENL_ATTR_EVENT)?;
    let class = event.get(..DEVICE_CLASS)?.split(|b| *b == 0).next()?;
    Some(String::from_utf8_lossy(class).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = u16::try_from(value.len() + 4)
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, run: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(NLMSG + GENL, 0);
        bytes.extend(run);
        bytes
    }

    #[test]
    fn the_question_is_well_formed() {
        let bytes = get_family("acpi_event");
        assert_eq!(bytes.len(), 36);
        assert_eq!(u32::from_ne_bytes(*bytes.first_chunk().unwrap()), 36);
        let (kind, run) = payload(&bytes).unwrap();
        assert_eq!(kind, GENL_ID_CTRL);
        assert_eq!(
            attribute(run, CTRL_ATTR_FAMILY_NAME),
            Some(&b"acpi_event\0"[..])
        );
    }

    #[test]
    fn family_and_group_are_found_in_the_reply() {
        let group = [attr(1, b"acpi_mc_group\0"), attr(2, &5_u32.to_ne_bytes())].concat();
        let run = [
            attr(2, b"acpi_event\0"),
            attr(1, &24_u16.to_ne_bytes()),
            attr(7 | 0x8000, &attr(1, &group)),
        ];
        assert_eq!(
            family_and_group(&message(GENL_ID_CTRL, &run.concat())),
            Some((24, 5))
        );
        assert_eq!(family_and_group(&message(2, &[])), None);
    }

    #[test]
    fn an_event_names_its_device_class() {
        let mut event = b"button/power".to_vec();
        event.resize(44, 0);
        let bytes = message(24, &attr(ACPI_GENL_ATTR_EVENT, &event));
        assert_eq!(device_class(&bytes, 24).as_deref(), Some("button/power"));
        assert_eq!(device_class(&bytes, 25), None);
        assert_eq!(device_class(&bytes[..30], 24), None);
    }
}
