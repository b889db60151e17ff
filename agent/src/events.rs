//! What happened, for a host that asks: kept in order, each with a number, until it is fetched or too old.

use std::collections::VecDeque;

use testudo_agent_protocol::{Event, EventsResponse, event::What};

use crate::rpc::ReplyTo;

/// Events kept.
const MOST: usize = 512;
/// Events in one answer.
const AT_ONCE: usize = 256;
/// Who may wait for the next at once.
const MOST_WAITERS: usize = 16;

#[derive(Default)]
pub(crate) struct Events {
    kept: VecDeque<Event>,
    last: u64,
    waiters: Vec<(u64, ReplyTo)>,
}

impl Events {
    pub(crate) fn add(&mut self, what: What) {
        self.last = self.last.saturating_add(1);
        if self.kept.len() >= MOST {
            self.kept.pop_front();
        }
        self.kept.push_back(Event {
            number: self.last,
            what: Some(what),
        });
    }

    /// Those after a number, if there are any.
    pub(crate) fn after(&self, number: u64) -> Option<EventsResponse> {
        let later = self.kept.iter().filter(|event| event.number > number);
        let events: Vec<Event> = later.take(AT_ONCE).cloned().collect();
        let first = events.first()?.number;
        let lost = first.saturating_sub(number).saturating_sub(1);
        Some(EventsResponse { events, lost })
    }

    /// Waits for one after that number; somebody else's place is given back if there are too many.
    pub(crate) fn wait(&mut self, after: u64, to: ReplyTo) -> Option<ReplyTo> {
        self.waiters.push((after, to));
        (self.waiters.len() > MOST_WAITERS).then(|| self.waiters.remove(0).1)
    }

    /// Those whose wait is over.
    pub(crate) fn due(&mut self) -> Vec<(ReplyTo, EventsResponse)> {
        let (mut due, mut left) = (Vec::new(), Vec::new());
        for (after, to) in std::mem::take(&mut self.waiters) {
            match self.after(after) {
                Some(events) => due.push((to, events)),
                None => left.push((after, to)),
            }
        }
        self.waiters = left;
        due
    }
}

#[cfg(test)]
mod tests {
    use testudo_agent_protocol::OomEvent;

    use super::*;

    #[test]
    fn what_is_lost_is_counted() {
        let mut events = Events::default();
        assert!(events.after(0).is_none());
        for kills in 1..=5000 {
            let container = String::new();
            events.add(What::Oom(OomEvent { container, kills }));
        }
        let answer = events.after(0).unwrap();
        assert_eq!(answer.lost, 5000 - 512);
        assert_eq!(answer.events.len(), AT_ONCE);
        let answer = events.after(4999).unwrap();
        assert_eq!((answer.lost, answer.events.len()), (0, 1));
        assert!(events.after(5000).is_none());
    }
}
