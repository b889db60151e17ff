//! The guest's network, on the host's word. All by jobs: an interface may have to appear first.

use std::sync::Arc;
use std::time::Duration;

use testudo_agent_protocol::{
    DeviceAddress, ListInterfacesRequest, ListInterfacesResponse, ListRoutesRequest,
    ListRoutesResponse, UpdateInterfaceRequest, UpdateInterfaceResponse, UpdateNeighboursRequest,
    UpdateNeighboursResponse, UpdateRoutesRequest, UpdateRoutesResponse, device_address::At,
};

use crate::agent::Agent;
use crate::network::Network;
use crate::rpc::ReplyTo;

/// How long an interface may take if the host does not say.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn update_interface(agent: &mut Agent, to: ReplyTo, request: UpdateInterfaceRequest) {
    let devices = Arc::clone(&agent.devices);
    agent.by_job::<UpdateInterfaceRequest, _>(
        to,
        "interface",
        move || {
            let wanted = request.interface.unwrap_or_default();
            let patience = match request.deadline_ms {
                0 => PATIENCE,
                ms => Duration::from_millis(u64::from(ms)),
            };
            let address = DeviceAddress {
                at: Some(At::Mac(wanted.mac.clone())),
            };
            devices.wait(&address, patience)?;
            Network::open()?.configure(&wanted)
        },
        |_, interface| {
            Ok(UpdateInterfaceResponse {
                interface: Some(interface),
            })
        },
    );
}

pub(super) fn update_routes(agent: &mut Agent, to: ReplyTo, request: UpdateRoutesRequest) {
    agent.by_job::<UpdateRoutesRequest, _>(
        to,
        "routes",
        move || Network::open()?.set_routes(&request.routes),
        |_, ()| Ok(UpdateRoutesResponse {}),
    );
}

pub(super) fn update_neighbours(agent: &mut Agent, to: ReplyTo, request: UpdateNeighboursRequest) {
    agent.by_job::<UpdateNeighboursRequest, _>(
        to,
        "neighbours",
        move || Network::open()?.add_neighbours(&request.neighbours),
        |_, ()| Ok(UpdateNeighboursResponse {}),
    );
}

pub(super) fn list_interfaces(agent: &mut Agent, to: ReplyTo) {
    agent.by_job::<ListInterfacesRequest, _>(
        to,
        "interfaces",
        || Network::open()?.interfaces(),
        |_, interfaces| Ok(ListInterfacesResponse { interfaces }),
    );
}

pub(super) fn list_routes(agent: &mut Agent, to: ReplyTo) {
    agent.by_job::<ListRoutesRequest, _>(
        to,
        "routes",
        || Network::open()?.routes(),
        |_, routes| Ok(ListRoutesResponse { routes }),
    );
}
