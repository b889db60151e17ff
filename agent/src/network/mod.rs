//! The guest's network: interfaces, addresses, routes and neighbours, by rtnetlink. Called by jobs.

mod address;
mod netlink;

use std::net::IpAddr;

use rustix::io::Errno;
use testudo_agent_protocol::{Interface, Neighbour, Route};

pub(crate) use address::Prefix;
use address::{mac, words_of_mac};
use netlink::{CREATE, Message, REPLACE, Socket, attributes};

use crate::failure::{During, Failure};

/// include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const NEW_NEIGHBOUR: u16 = 28;
const LINK_ADDRESS: u16 = 1;
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
const ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ADDRESS_FLAGS: u16 = 8;
/// No duplicate address detection: the host has given it, and the guest would wait a second.
const NO_DAD: u32 = 0x02;
const ROUTE_DESTINATION: u16 = 1;
const ROUTE_OUT: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;
const ROUTE_PRIORITY: u16 = 6;
const ROUTE_SOURCE: u16 = 7;
const ROUTE_METRICS: u16 = 8;
const ROUTE_TABLE: u16 = 15;
const METRIC_MTU: u16 = 2;
const MAIN: u8 = 254;
const STATIC: u8 = 4;
const UNICAST: u8 = 1;
const ONLINK: u32 = 4;
const UP: u32 = 0x1;
const NOARP: u32 = 0x80;
const LINK_FIXED: usize = 16;
const ADDRESS_FIXED: usize = 8;
const ROUTE_FIXED: usize = 12;

struct Link {
    index: u32,
    name: String,
    mac: String,
    mtu: u32,
    flags: u32,
}

fn number(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn terminated(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn link_fixed(index: u32, flags: u32, mask: u32) -> Vec<u8> {
    // ifinfomsg: family, padding, type, index, flags, change
    let mut fixed = vec![0; 4];
    fixed.extend_from_slice(&index.to_ne_bytes());
    fixed.extend_from_slice(&flags.to_ne_bytes());
    fixed.extend_from_slice(&mask.to_ne_bytes());
    fixed
}

/// The guest's interfaces and routes.
pub(crate) struct Network {
    socket: Socket,
}

impl Network {
    pub(crate) fn open() -> Result<Self, Failure> {
        let socket = Socket::open().during(|| "open a netlink socket".into())?;
        Ok(Self { socket })
    }

    fn links(&self) -> Result<Vec<Link>, Failure> {
        let ask = Message::new(GET_LINK, 0, &link_fixed(0, 0, 0));
        let answers = self.socket.list(ask).during(|| "list interfaces".into())?;
        let read = |body: &[u8]| {
            let mut link = Link {
                index: number(body.get(4..).unwrap_or_default()),
                flags: number(body.get(8..).unwrap_or_default()),
                name: String::new(),
                mac: String::new(),
                mtu: 0,
            };
            for (kind, data) in attributes(body, LINK_FIXED) {
                match kind {
                    LINK_NAME => link.name = text(data),
                    LINK_ADDRESS => link.mac = words_of_mac(data),
                    LINK_MTU => link.mtu = number(data),
                    _ => {}
                }
            }
            link
        };
        let links = answers.iter().filter(|(kind, _)| *kind == NEW_LINK);
        Ok(links.map(|(_, body)| read(body)).collect())
    }

    fn link(&self, is: impl Fn(&Link) -> bool, words: &str) -> Result<Link, Failure> {
        let link = self.links()?.into_iter().find(is);
        link.ok_or_else(|| Failure::not_found(format!("there is no interface {words}")))
    }

    /// The name of the interface of that MAC address.
    pub(crate) fn name_of(&self, mac: &str) -> Option<String> {
        let mut links = self.links().ok()?.into_iter();
        let link = links.find(|link| link.mac.eq_ignore_ascii_case(mac));
        link.map(|link| link.name)
    }

    /// As the host wants it. Addresses that it does not name go.
    pub(crate) fn configure(&self, wanted: &Interface) -> Result<Interface, Failure> {
        let mac = mac(&wanted.mac)?;
        let words = words_of_mac(&mac);
        let prefixes = wanted
            .addresses
            .iter()
            .map(|address| Prefix::read(address))
            .collect::<Result<Vec<_>, _>>()?;
        let link = self.link(|link| link.mac == words, &words)?;
        if !wanted.name.is_empty() && link.name != wanted.name {
            self.rename(&link, &wanted.name)?;
        }
        let about = || format!("configure the interface of {words}");
        for (family, old) in self.addresses(link.index)? {
            // What the kernel gives each interface of itself stays.
            let own = matches!(old.address, IpAddr::V6(a) if a.segments().first() == Some(&0xfe80));
            if !own && !prefixes.contains(&old) {
                let gone = self.address_message(DELETE_ADDRESS, 0, link.index, family, &old);
                self.socket.change(gone).during(about)?;
            }
        }
        let flags = if wanted.noarp { NOARP } else { 0 };
        let mut change = Message::new(NEW_LINK, 0, &link_fixed(link.index, flags | UP, NOARP | UP));
        if wanted.mtu != 0 {
            change = change.with(LINK_MTU, &wanted.mtu.to_ne_bytes());
        }
        self.socket.change(change).during(about)?;
        for prefix in &prefixes {
            let flags = CREATE | REPLACE;
            let new = self.address_message(NEW_ADDRESS, flags, link.index, prefix.family(), prefix);
            self.socket
                .change(new)
                .during(|| format!("give {prefix} to the interface of {words}"))?;
        }
        let now = self
            .interfaces()?
            .into_iter()
            .find(|interface| interface.mac == words);
        now.ok_or_else(|| Failure::not_found(format!("the interface of {words} has gone")))
    }

    /// Whoever has the name gets another first.
    fn rename(&self, link: &Link, name: &str) -> Result<(), Failure> {
        let about = || format!("name an interface {name}");
        if name.len() > 15 || name.contains(['/', ':', ' ', '\0']) || name.starts_with('.') {
            return Err(Failure::invalid(format!(
                "{name:?} is no name of an interface"
            )));
        }
        if let Some(holder) = self.links()?.into_iter().find(|other| other.name == name) {
            self.set_name(&holder, &format!("was{}", holder.index))
                .during(about)?;
        }
        self.set_name(link, name).during(about)
    }

    /// A name can be changed only while the interface is down.
    fn set_name(&self, link: &Link, name: &str) -> rustix::io::Result<()> {
        if link.flags & UP != 0 {
            self.socket
                .change(Message::new(NEW_LINK, 0, &link_fixed(link.index, 0, UP)))?;
        }
        let change = Message::new(NEW_LINK, 0, &link_fixed(link.index, 0, 0));
        self.socket
            .change(change.with(LINK_NAME, &terminated(name)))
    }

    fn addresses(&self, index: u32) -> Result<Vec<(u8, Prefix)>, Failure> {
        let ask = Message::new(GET_ADDRESS, 0, &[0; ADDRESS_FIXED]);
        let answers = self.socket.list(ask).during(|| "list addresses".into())?;
        let mut found = Vec::new();
        for (kind, body) in &answers {
            let [family, length, _, _, i0, i1, i2, i3] = *body.first_chunk().unwrap_or(&[0; 8]);
            if *kind != NEW_ADDRESS || u32::from_ne_bytes([i0, i1, i2, i3]) != index {
                continue;
            }
            let all = attributes(body, ADDRESS_FIXED);
            // Of a point-to-point interface ADDRESS is the other end's.
            let of = |wanted| {
                all.iter()
                    .find(|(kind, _)| *kind == wanted)
                    .map(|(_, data)| *data)
            };
            let address = of(ADDRESS_LOCAL)
                .or_else(|| of(ADDRESS))
                .and_then(address::from_bytes);
            if let Some(address) = address {
                found.push((family, Prefix { address, length }));
            }
        }
        Ok(found)
    }

    fn address_message(
        &self,
        kind: u16,
        flags: u16,
        index: u32,
        family: u8,
        prefix: &Prefix,
    ) -> Message {
        let mut fixed = vec![family, prefix.length, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        let bytes = address::to_bytes(prefix.address);
        let message = Message::new(kind, flags, &fixed)
            .with(ADDRESS_LOCAL, &bytes)
            .with(ADDRESS, &bytes);
        match prefix.address {
            IpAddr::V6(_) => message.with(ADDRESS_FLAGS, &NO_DAD.to_ne_bytes()),
            IpAddr::V4(_) => message,
        }
    }

    /// All of them but the loopback.
    pub(crate) fn interfaces(&self) -> Result<Vec<Interface>, Failure> {
        let links = self.links()?.into_iter().filter(|link| link.name != "lo");
        links
            .map(|link| {
                let addresses = self.addresses(link.index)?;
                Ok(Interface {
                    addresses: addresses
                        .iter()
                        .map(|(_, prefix)| prefix.to_string())
                        .collect(),
                    mac: link.mac,
                    name: link.name,
                    mtu: link.mtu,
                    noarp: link.flags & NOARP != 0,
                })
            })
            .collect()
    }

    /// The routes the host wants; static ones it does not name go. Those through nobody come first, for
    /// the others need them.
    pub(crate) fn set_routes(&self, wanted: &[Route]) -> Result<(), Failure> {
        let messages = wanted
            .iter()
            .map(|route| Ok((route, self.route_message(route)?)))
            .collect::<Result<Vec<_>, Failure>>()?;
        for (_, body) in self.static_routes()? {
            let fixed = body.get(..ROUTE_FIXED).unwrap_or_default().to_vec();
            let gone = attributes(&body, ROUTE_FIXED)
                .into_iter()
                .filter(|(kind, _)| {
                    [
                        ROUTE_DESTINATION,
                        ROUTE_OUT,
                        ROUTE_GATEWAY,
                        ROUTE_PRIORITY,
                        ROUTE_TABLE,
                    ]
                    .contains(kind)
                })
                .fold(Message::new(DELETE_ROUTE, 0, &fixed), |m, (kind, data)| {
                    m.with(kind, data)
                });
            match self.socket.change(gone) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(e) => return Err(e).during(|| "remove a route".into()),
            }
        }
        let (near, far): (Vec<_>, Vec<_>) = messages
            .into_iter()
            .partition(|(route, _)| route.gateway.is_empty());
        for (route, message) in near.into_iter().chain(far) {
            self.socket.change(message).during(|| {
                format!(
                    "add the route to {} by {:?}",
                    route.destination, route.gateway
                )
            })?;
        }
        for route in wanted.iter().filter(|route| !route.gateway.is_empty()) {
            if let Err(e) = self.resolve(&route.gateway, &route.device) {
                log::debug!("{} is not asked for its address: {e}", route.gateway);
            }
        }
        Ok(())
    }

    /// Has the kernel ask a gateway for its hardware address now. That also tells the other end who the guest is: a
    /// switch, or a user-mode stack, learns it from the first frame, and what it sends before goes to everybody, which
    /// TCP does not take for its own. A guest that only listens would never be reached.
    fn resolve(&self, gateway: &str, device: &str) -> Result<(), Failure> {
        /// NTF_USE
        const USE: u8 = 0x01;
        let address = address::read(gateway)?;
        let link = self.link(|link| link.name == device, device)?;
        // ndmsg: family, padding, index, state, flags, type
        let mut fixed = vec![address::family(address), 0, 0, 0];
        fixed.extend_from_slice(&link.index.to_ne_bytes());
        fixed.extend_from_slice(&[0, 0, USE, 0]);
        let message =
            Message::new(NEW_NEIGHBOUR, CREATE, &fixed).with(1, &address::to_bytes(address));
        self.socket
            .change(message)
            .during(|| format!("ask for neighbour {gateway}"))
    }

    fn route_message(&self, route: &Route) -> Result<Message, Failure> {
        let destination = Prefix::read(&route.destination)?;
        let address = |text: &str| -> Result<Option<Vec<u8>>, Failure> {
            if text.is_empty() {
                return Ok(None);
            }
            Ok(Some(address::to_bytes(address::read(text)?)))
        };
        let out = if route.device.is_empty() {
            None
        } else {
            let link = self.link(|link| link.name == route.device, &route.device)?;
            Some(link.index.to_ne_bytes().to_vec())
        };
        let scope = u8::try_from(route.scope)
            .map_err(|_| Failure::invalid(format!("a route's scope is {}", route.scope)))?;
        // rtmsg: family, destination's and source's lengths, tos, table, protocol, scope, type, flags
        let mut fixed = vec![
            destination.family(),
            destination.length,
            0,
            0,
            MAIN,
            STATIC,
            scope,
            UNICAST,
        ];
        fixed.extend_from_slice(&(if route.onlink { ONLINK } else { 0 }).to_ne_bytes());
        let mut message = Message::new(NEW_ROUTE, CREATE | REPLACE, &fixed)
            .with_some(ROUTE_OUT, out)
            .with_some(ROUTE_GATEWAY, address(&route.gateway)?)
            .with_some(ROUTE_SOURCE, address(&route.source)?);
        if destination.length != 0 {
            message = message.with(ROUTE_DESTINATION, &address::to_bytes(destination.address));
        }
        if route.metric != 0 {
            message = message.with(ROUTE_PRIORITY, &route.metric.to_ne_bytes());
        }
        if route.mtu != 0 {
            // An attribute in an attribute.
            let mut nested = 8_u16.to_ne_bytes().to_vec();
            nested.extend_from_slice(&METRIC_MTU.to_ne_bytes());
            nested.extend_from_slice(&route.mtu.to_ne_bytes());
            message = message.with(ROUTE_METRICS, &nested);
        }
        Ok(message)
    }

    /// Of the main table, made by somebody rather than by the kernel.
    fn static_routes(&self) -> Result<Vec<(u16, Vec<u8>)>, Failure> {
        let ask = Message::new(GET_ROUTE, 0, &[0; ROUTE_FIXED]);
        let all = self.socket.list(ask).during(|| "list routes".into())?;
        let ours = |body: &[u8]| {
            matches!(body, [_, _, _, _, table, protocol, _, kind, ..]
                if *table == MAIN && *protocol == STATIC && *kind == UNICAST)
        };
        Ok(all
            .into_iter()
            .filter(|(kind, body)| *kind == NEW_ROUTE && ours(body))
            .collect())
    }

    pub(crate) fn routes(&self) -> Result<Vec<Route>, Failure> {
        let links = self.links()?;
        let routes = self.static_routes()?;
        Ok(routes
            .iter()
            .map(|(_, body)| read_route(body, &links))
            .collect())
    }

    /// Neighbours that need not be asked for.
    pub(crate) fn add_neighbours(&self, wanted: &[Neighbour]) -> Result<(), Failure> {
        /// NUD_PERMANENT
        const PERMANENT: u16 = 0x80;
        for neighbour in wanted {
            let address = address::read(&neighbour.address)?;
            let mac = mac(&neighbour.mac)?;
            let link = self.link(|link| link.name == neighbour.device, &neighbour.device)?;
            // ndmsg: family, padding, index, state, flags, type
            let mut fixed = vec![address::family(address), 0, 0, 0];
            fixed.extend_from_slice(&link.index.to_ne_bytes());
            fixed.extend_from_slice(&PERMANENT.to_ne_bytes());
            fixed.extend_from_slice(&[0, 0]);
            let message = Message::new(NEW_NEIGHBOUR, CREATE | REPLACE, &fixed)
                .with(1, &address::to_bytes(address))
                .with(2, &mac);
            self.socket
                .change(message)
                .during(|| format!("add neighbour {}", neighbour.address))?;
        }
        Ok(())
    }
}

fn read_route(body: &[u8], links: &[Link]) -> Route {
    let [family, length, _, _, _, _, scope, _] = *body.first_chunk().unwrap_or(&[0; 8]);
    let mut route = Route {
        destination: Prefix::everything(family).to_string(),
        scope: scope.into(),
        ..Route::default()
    };
    for (kind, data) in attributes(body, ROUTE_FIXED) {
        let address = || address::from_bytes(data);
        let words = || address().map(|a| a.to_string()).unwrap_or_default();
        match kind {
            ROUTE_DESTINATION => {
                if let Some(address) = address() {
                    route.destination = Prefix { address, length }.to_string();
                }
            }
            ROUTE_GATEWAY => route.gateway = words(),
            ROUTE_SOURCE => route.source = words(),
            ROUTE_PRIORITY => route.metric = number(data),
            ROUTE_OUT => {
                let link = links.iter().find(|link| link.index == number(data));
                route.device = link.map(|link| link.name.clone()).unwrap_or_default();
            }
            _ => {}
        }
    }
    route
}
