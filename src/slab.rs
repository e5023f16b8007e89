//! A fixed number of slots, reused, each use with a number of its own.

/// Names one use of one slot: the slot's index and how often it was used before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Which slot.
    pub index: u32,
    /// Which use of it.
    pub generation: u32,
}

/// At most `N` values. The slot freed last is used first, so few values touch few pages.
///
/// Empty it is all zeros: as a static it takes no room in the program's file, and a slot's memory is
/// first touched when the slot is first used.
pub struct Slab<T, const N: usize> {
    slots: heapless::Vec<Slot<T>, N>,
    /// First of the chain of free slots, plus 1; 0 ends it.
    free: u32,
    length: usize,
}

struct Slot<T> {
    value: Option<T>,
    generation: u32,
    next: u32,
}

impl<T, const N: usize> Slab<T, N> {
    /// No value.
    pub const fn new() -> Self {
        Self {
            slots: heapless::Vec::new(),
            free: 0,
            length: 0,
        }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether all slots are taken.
    pub fn is_full(&self) -> bool {
        self.length == N
    }

    /// Stores a value, or gives it back when all slots are taken.
    pub fn insert(&mut self, value: T) -> Result<Key, T> {
        let index = match self.free.checked_sub(1) {
            Some(index) => index,
            None => {
                let index = self.slots.len();
                let fresh = Slot {
                    value: None,
                    generation: 0,
                    next: 0,
                };
                if self.slots.push(fresh).is_err() {
                    return Err(value);
                }
                index as u32
            }
        };
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return Err(value);
        };
        self.free = slot.next;
        slot.next = 0;
        slot.value = Some(value);
        self.length += 1;
        Ok(Key {
            index,
            generation: slot.generation,
        })
    }

    /// The value stored under `key`, unless it was removed.
    pub fn get(&self, key: Key) -> Option<&T> {
        let slot = self.slots.get(key.index as usize)?;
        slot.value
            .as_ref()
            .filter(|_| slot.generation == key.generation)
    }

    /// The value stored under `key`, unless it was removed.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.index as usize)?;
        slot.value
            .as_mut()
            .filter(|_| slot.generation == key.generation)
    }

    /// Takes the value stored under `key` out.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        slot.next = self.free;
        self.free = key.index + 1;
        self.length -= 1;
        Some(value)
    }

    /// The key of the value in slot `index`, for walks during which values come and go.
    pub fn key_at(&self, index: usize) -> Option<Key> {
        let slot = self.slots.get(index)?;
        slot.value.as_ref()?;
        Some(Key {
            index: index as u32,
            generation: slot.generation,
        })
    }

    /// All slots that were ever used: the range of indexes for [`key_at`](Self::key_at).
    pub fn used(&self) -> usize {
        self.slots.len()
    }

    /// All values with their keys.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        let slots = self.slots.iter();
        slots.enumerate().filter_map(|(index, slot)| {
            let key = Key {
                index: index as u32,
                generation: slot.generation,
            };
            Some((key, slot.value.as_ref()?))
        })
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
    fn it_behaves_as_a_map_of_bounded_size_and_never_revives_a_key() {
        let mut random = 7u32;
        let mut slab = Slab::<u32, 8>::new();
        let mut model = HashMap::new();
        let mut dead = Vec::new();
        for step in 0..20_000u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if random >> 31 == 0 {
                match slab.insert(step) {
                    Ok(key) => {
                        assert!(model.insert((key.index, key.generation), step).is_none());
                    }
                    Err(value) => assert_eq!((value, model.len()), (step, 8)),
                }
            } else if let Some(key) = slab.key_at((random >> 24) as usize % 8) {
                assert_eq!(slab.remove(key), model.remove(&(key.index, key.generation)));
                dead.push(key);
            }
            assert_eq!(slab.len(), model.len());
            assert_eq!(slab.iter().count(), model.len());
            assert!(
                slab.iter()
                    .all(|(key, value)| model[&(key.index, key.generation)] == *value)
            );
            assert!(
                dead.iter()
                    .rev()
                    .take(20)
                    .all(|key| slab.get(*key).is_none())
            );
        }
    }

    #[test]
    fn the_slot_freed_last_is_used_first() {
        let mut slab = Slab::<u8, 4>::new();
        let first = slab.insert(1).unwrap();
        slab.insert(2).unwrap();
        slab.remove(first);
        assert_eq!(slab.insert(3).unwrap().index, first.index);
        assert_eq!(slab.used(), 2);
    }
}
