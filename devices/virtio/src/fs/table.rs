//! Numbers the guest is given for things of the server's.

/// A table whose numbers are never those of a thing that is gone: a place is taken again with
/// another generation.
///
/// A number is `generation << 32 | place`; both begin at 1 so that a small number, such as that of
/// the root node, is nobody's.
#[derive(Debug)]
pub(super) struct Table<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
    limit: usize,
}

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    thing: Option<T>,
}

fn split(number: u64) -> Option<(usize, u32)> {
    let place = usize::try_from(number & 0xffff_ffff).ok()?.checked_sub(1)?;
    Some((place, u32::try_from(number >> 32).ok()?))
}

fn join(place: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(place).saturating_add(1)
}

impl<T> Table<T> {
    /// An empty table for at most `limit` things.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
            limit: limit.min(u32::MAX as usize / 2),
        }
    }

    /// Things in it.
    pub(super) fn len(&self) -> usize {
        self.places.len().saturating_sub(self.free.len())
    }

    /// The number of `thing`, or `None` if the table is full.
    pub(super) fn insert(&mut self, thing: T) -> Option<u64> {
        if self.len() >= self.limit {
            return None;
        }
        if let Some(free) = self.free.pop() {
            let place = self.places.get_mut(usize::try_from(free).ok()?)?;
            place.generation = place.generation.checked_add(1).unwrap_or(1);
            place.thing = Some(thing);
            return Some(join(free, place.generation));
        }
        let place = u32::try_from(self.places.len()).ok()?;
        self.places.push(Place {
            generation: 1,
            thing: Some(thing),
        });
        Some(join(place, 1))
    }

    pub(super) fn get(&self, number: u64) -> Option<&T> {
        let (place, generation) = split(number)?;
        let place = self.places.get(place)?;
        place
            .thing
            .as_ref()
            .filter(|_| place.generation == generation)
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let (place, generation) = split(number)?;
        let place = self.places.get_mut(place)?;
        let same = place.generation == generation;
        place.thing.as_mut().filter(|_| same)
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<T> {
        self.get(number)?;
        let (index, _) = split(number)?;
        let thing = self.places.get_mut(index)?.thing.take();
        self.free.push(u32::try_from(index).ok()?);
        thing
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_number_is_one_thing_for_ever(steps: Vec<Option<(u8, u64)>>) {
            let mut table = Table::new(20);
            let mut model: HashMap<u64, usize> = HashMap::new();
            let mut numbers = Vec::new();
            for (serial, step) in steps.into_iter().enumerate() {
                match step {
                    None => match table.insert(serial) {
                        Some(number) => {
                            prop_assert!(!numbers.contains(&number) && number > u64::from(u32::MAX));
                            numbers.push(number);
                            model.insert(number, serial);
                        }
                        None => prop_assert_eq!(model.len(), 20),
                    },
                    Some((which, any)) => {
                        let known = numbers.get(usize::from(which)).copied();
                        let number = known.unwrap_or(any);
                        prop_assert_eq!(table.get(number), model.get(&number));
                        prop_assert_eq!(table.remove(number), model.remove(&number));
                        prop_assert!(table.get_mut(number).is_none());
                    }
                }
                prop_assert_eq!(table.len(), model.len());
            }
        }
    }
}
