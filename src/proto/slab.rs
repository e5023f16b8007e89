//! A fixed number of reusable slots with generational keys.

/// Identifies one use of a slot: the slot's index, and how often it was used before.
///
/// The counter has 16 bits: a key must not be kept while its slot is used 65,536 times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key(u32);

impl Key {
    /// The slot's index.
    pub fn index(self) -> usize {
        self.0 as usize & 0xffff
    }

    /// The key of the slot's next use.
    fn next(self) -> Self {
        Self(self.0.wrapping_add(1 << 16))
    }

    /// The key as a number.
    pub fn to_bits(self) -> u32 {
        self.0
    }

    /// The key from [`to_bits`](Self::to_bits).
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

/// At most `N` values, 65,536 at most. The first free slot is used, so few values touch few pages.
///
/// A slot's memory is first touched when the slot is first used.
pub struct Slab<T, const N: usize> {
    slots: heapless::Vec<Slot<T>, N>,
}

struct Slot<T> {
    key: Key,
    value: Option<T>,
}

impl<T, const N: usize> Slab<T, N> {
    /// No value.
    pub const fn new() -> Self {
        Self {
            slots: heapless::Vec::new(),
        }
    }

    /// Stores a value; drops it and returns `None` if all slots are taken.
    pub fn insert(&mut self, value: T) -> Option<Key> {
        let used = self.slots.len();
        let free = self.slots.iter().position(|slot| slot.value.is_none());
        if free.is_none() {
            let key = Key(used as u32);
            self.slots.push(Slot { key, value: None }).ok()?;
        }
        let slot = self.slots.get_mut(free.unwrap_or(used))?;
        slot.value = Some(value);
        Some(slot.key)
    }

    /// Whether all slots are taken.
    pub fn is_full(&self) -> bool {
        self.slots.is_full() && self.slots.iter().all(|slot| slot.value.is_some())
    }

    fn slot(&mut self, key: Key) -> Option<&mut Slot<T>> {
        let slot = self.slots.get_mut(key.index())?;
        (slot.key == key).then_some(slot)
    }

    /// The value stored under `key`, unless it was removed.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        self.slot(key)?.value.as_mut()
    }

    /// Removes and returns the value stored under `key`.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slot(key)?;
        slot.key = key.next();
        slot.value.take()
    }

    /// The key of the value in slot `index`, for iterating while values are added and removed.
    pub fn key_at(&self, index: usize) -> Option<Key> {
        let slot = self.slots.get(index)?;
        slot.value.as_ref()?;
        Some(slot.key)
    }

    /// Number of slots that were ever used: the limit of indexes for [`key_at`](Self::key_at).
    pub fn used(&self) -> usize {
        self.slots.len()
    }

    /// All values with their keys.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        let slots = self.slots.iter();
        slots.filter_map(|slot| Some((slot.key, slot.value.as_ref()?)))
    }
}

impl<T, const N: usize> Default for Slab<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_slab_is_a_bounded_map_that_never_reuses_a_key() {
        let mut random = 7u32;
        let mut slab = Slab::<u32, 8>::new();
        let mut model = HashMap::new();
        let mut dead = Vec::new();
        for step in 0..20_000u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if random >> 31 == 0 {
                assert_eq!(slab.is_full(), model.len() == 8);
                match slab.insert(step) {
                    Some(key) => assert!(model.insert(key, step).is_none()),
                    None => assert_eq!(model.len(), 8),
                }
            } else if let Some(key) = slab.key_at((random >> 24) as usize % 8) {
                assert_eq!(slab.get_mut(key).copied(), model.remove(&key));
                slab.remove(key);
                slab.remove(key);
                dead.push(key);
            }
            assert_eq!(slab.iter().count(), model.len());
            assert!(slab.iter().all(|(key, value)| model[&key] == *value));
            assert!(
                dead.iter()
                    .rev()
                    .take(20)
                    .all(|key| slab.get_mut(*key).is_none())
            );
        }
    }

    #[test]
    fn the_first_free_slot_is_used() {
        let mut slab = Slab::<u8, 4>::new();
        let first = slab.insert(1).unwrap();
        slab.insert(2).unwrap();
        slab.remove(first);
        assert_eq!(slab.insert(3).unwrap().index(), first.index());
        assert_eq!(slab.used(), 2);
    }

    #[test]
    fn a_key_converts_to_a_number_and_back() {
        let mut slab = Slab::<u8, 4>::new();
        let key = slab.insert(1).unwrap();
        slab.remove(key);
        let key = slab.insert(2).unwrap();
        assert_eq!(slab.get_mut(Key::from_bits(key.to_bits())), Some(&mut 2));
    }
}
