//! A fixed number of reusable slots with generational keys.

use core::mem::MaybeUninit;

/// Bits of a key for the slot's index.
const INDEX_BITS: u32 = 9;

/// So many slots always keep their memory.
const KEPT: usize = 8;

/// Identifies one use of a slot: the slot's index, and how many values were stored in the slab before.
///
/// The counter has 23 bits: a key must not be kept while 8,388,608 values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key(u32);

impl Key {
    fn new(index: usize, count: u32) -> Self {
        Self(count << INDEX_BITS | index as u32)
    }

    /// The slot's index.
    pub fn index(self) -> usize {
        self.0 as usize & ((1 << INDEX_BITS) - 1)
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

/// At most `N` values, 512 at most. The first free slot is used, so few values touch few pages.
///
/// A slot's memory is first touched when the slot is first used.
pub struct Slab<T, const N: usize> {
    slots: heapless::Vec<Slot<T>, N>,
    /// Number of values that were stored.
    count: u32,
}

struct Slot<T> {
    key: Key,
    value: Option<T>,
}

impl<T, const N: usize> Slab<T, N> {
    /// No value.
    pub const fn new() -> Self {
        const { assert!(N <= 1 << INDEX_BITS) };
        Self {
            slots: heapless::Vec::new(),
            count: 0,
        }
    }

    /// Stores a value; drops it and returns `None` if all slots are taken.
    pub fn insert(&mut self, value: T) -> Option<Key> {
        let used = self.slots.len();
        let free = self.slots.iter().position(|slot| slot.value.is_none());
        let key = Key::new(free.unwrap_or(used), self.count);
        if free.is_none() {
            self.slots.push(Slot { key, value: None }).ok()?;
        }
        let slot = self.slots.get_mut(key.index())?;
        slot.key = key;
        slot.value = Some(value);
        self.count = self.count.wrapping_add(1);
        Some(key)
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
        self.slot(key)?.value.take()
    }

    /// Gives up the slots after the last value if they are most of those that were used, and returns their
    /// memory, which the caller should free.
    pub fn shrink(&mut self) -> &mut [MaybeUninit<impl Sized + use<T, N>>] {
        let last = self.slots.iter().rposition(|slot| slot.value.is_some());
        let (used, touched) = (last.map_or(0, |last| last + 1), self.slots.len());
        if touched <= KEPT || used > touched / 4 {
            return &mut [];
        }
        self.slots.truncate(used);
        self.slots.spare_capacity_mut()
    }

    /// The key of the value in slot `index`, for iterating while values are added and removed.
    pub fn key_at(&self, index: usize) -> Option<Key> {
        let slot = self.slots.get(index)?;
        slot.value.as_ref()?;
        Some(slot.key)
    }

    /// The limit of indexes for [`key_at`](Self::key_at).
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
            if step % 64 == 0 {
                slab.shrink();
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
    fn the_memory_of_many_values_is_given_up_once_few_are_left() {
        let mut slab = Slab::<u8, 64>::new();
        let keys: Vec<_> = (0..40).map(|value| slab.insert(value).unwrap()).collect();
        // The first three stay, and one of those in the middle.
        for key in keys[3..].iter().filter(|key| key.index() != 20) {
            slab.remove(*key);
        }
        assert_eq!(slab.shrink().len(), 0);
        slab.remove(keys[20]);
        assert_eq!(slab.shrink().len(), 61);
        assert_eq!(slab.shrink().len(), 0);
        assert_eq!((slab.used(), slab.get_mut(keys[2])), (3, Some(&mut 2)));
        let again = slab.insert(7).unwrap();
        assert_eq!((again.index(), slab.get_mut(keys[3])), (3, None));
        // A few keep it.
        (0..4).for_each(|value| _ = slab.insert(value));
        (keys[..3].iter().chain([&again])).for_each(|key| _ = slab.remove(*key));
        assert_eq!((slab.shrink().len(), slab.used()), (0, 8));
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
