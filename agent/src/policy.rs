//! The one place where a request is allowed or refused, by its name and content.

use testudo_agent_protocol::Call;

/// Decides about requests.
pub(crate) trait Policy {
    /// An error says why not.
    fn check(&self, call: &Call) -> Result<(), String>;
}

/// All requests but those of these names: the policy of a guest that trusts its host, or trusts it with
/// less. It cannot be widened while the guest runs.
pub(crate) struct AllBut(pub(crate) Vec<&'static str>);

impl AllBut {
    /// The names, as a setting lists them; nothing if one is no request.
    pub(crate) fn read(list: &str) -> Option<Vec<&'static str>> {
        let known = |word| Call::NAMES.iter().copied().find(|name| *name == word);
        list.split(',').map(known).collect()
    }
}

impl Policy for AllBut {
    fn check(&self, call: &Call) -> Result<(), String> {
        if self.0.contains(&call.name()) {
            return Err(format!("this guest takes no {} (agent.deny)", call.name()));
        }
        Ok(())
    }
}
