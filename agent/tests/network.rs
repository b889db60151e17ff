//! Interfaces, routes and neighbours, in a network namespace of the agent's own.
#![expect(clippy::unwrap_used, reason = "a test: a failure is a panic")]

mod support;

use support::Agent;
use testudo_agent_protocol::{
    Interface, ListInterfacesRequest, ListRoutesRequest, Neighbour, Route, UpdateInterfaceRequest,
    UpdateNeighboursRequest, UpdateRoutesRequest, code,
};

const MAC: &str = "52:54:00:12:34:56";

fn route(destination: &str, gateway: &str) -> Route {
    Route {
        destination: destination.into(),
        gateway: gateway.into(),
        device: "eth0".into(),
        ..Route::default()
    }
}

#[test]
fn an_interface_its_routes_and_neighbours() {
    need_containers!();
    let agent = Agent::start_in_network();
    agent.ip(&["link", "add", "first7", "address", MAC, "type", "bridge"]);
    agent.ip(&["link", "add", "eth0", "type", "bridge"]);
    let interface = Interface {
        mac: MAC.to_uppercase(),
        name: "eth0".into(),
        addresses: vec!["10.1.2.3/24".into(), "fd00::3/64".into()],
        mtu: 1400,
        noarp: false,
    };
    let update = UpdateInterfaceRequest {
        interface: Some(interface),
        deadline_ms: 1000,
    };
    for _ in 0..2 {
        // The same twice changes nothing.
        let now = agent.call(&update).unwrap().interface.unwrap();
        assert_eq!((now.name.as_str(), now.mtu), ("eth0", 1400));
        assert!(now.addresses.contains(&"10.1.2.3/24".into()), "{now:?}");
        assert!(now.addresses.contains(&"fd00::3/64".into()), "{now:?}");
    }
    let names: Vec<String> = agent
        .call(&ListInterfacesRequest {})
        .unwrap()
        .interfaces
        .into_iter()
        .map(|i| i.name)
        .collect();
    assert_eq!(
        names.len(),
        2,
        "whoever had the name has another: {names:?}"
    );
    // The far one first: the near one is needed for it.
    let mut near = route("192.168.0.0/16", "");
    near.scope = 253;
    let routes = vec![route("0.0.0.0/0", "192.168.1.1"), near];
    agent.call(&UpdateRoutesRequest { routes }).unwrap();
    let listed = agent.call(&ListRoutesRequest {}).unwrap().routes;
    assert_eq!(listed.len(), 2, "{listed:?}");
    let routes = vec![route("10.9.0.0/16", "10.1.2.1")];
    agent
        .call(&UpdateRoutesRequest {
            routes: routes.clone(),
        })
        .unwrap();
    assert_eq!(agent.call(&ListRoutesRequest {}).unwrap().routes, routes);
    // It is asked for its hardware address at once, and so hears of the guest.
    let asked = agent.ip(&["neigh", "show", "10.1.2.1", "nud", "all"]);
    assert!(asked.contains("10.1.2.1 dev eth0"), "{asked}");
    let neighbours = vec![Neighbour {
        address: "10.1.2.9".into(),
        mac: "52:54:00:00:00:09".into(),
        device: "eth0".into(),
    }];
    agent.call(&UpdateNeighboursRequest { neighbours }).unwrap();
    let shown = agent.ip(&["neigh", "show", "10.1.2.9"]);
    assert!(
        shown.contains("52:54:00:00:00:09") && shown.contains("PERMANENT"),
        "{shown}"
    );
}

#[test]
fn a_missing_interface_is_waited_for_and_then_told() {
    need_containers!();
    let agent = Agent::start_in_network();
    let interface = Interface {
        mac: MAC.into(),
        ..Interface::default()
    };
    let update = UpdateInterfaceRequest {
        interface: Some(interface),
        deadline_ms: 100,
    };
    let error = agent.call(&update).unwrap_err();
    assert_eq!(error.code(), Some(code::DEADLINE), "{error}");
    let bad = Interface {
        mac: MAC.into(),
        addresses: vec!["10.0.0.1".into()],
        ..Interface::default()
    };
    agent.ip(&["link", "add", "first7", "address", MAC, "type", "bridge"]);
    let update = UpdateInterfaceRequest {
        interface: Some(bad),
        deadline_ms: 100,
    };
    assert_eq!(agent.call(&update).unwrap_err().code(), Some(code::INVALID));
}
