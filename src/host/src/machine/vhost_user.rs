//! The backend of vhost-user: QEMU shares the guest's memory and a device's virtqueues. (QEMU
//! docs/interop/vhost-user.rst)

use std::{
    fs::File,
    io::{IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// Maximum number of memory regions (VHOST_USER_MAX_RAM_SLOTS of older versions).
const MAX_REGIONS: usize = 8;

/// Maximum size of a virtqueue; Linux uses at most the size that it is offered.
const MAX_QUEUE: u16 = 1024;

/// Maximum payload of a message in bytes: the configuration space is the longest.
const MAX_PAYLOAD: usize = 512;

// Requests (numbers in the specification).
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;

/// Version 1 of the protocol, and the reply flag.
const REPLY: u32 = 1 | 1 << 2;

// Features of virtio and of the protocol.
const F_EVENT_IDX: u64 = 1 << 29;
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
const PROTOCOL_MULTIQUEUE: u64 = 1 << 0;
const PROTOCOL_CONFIG: u64 = 1 << 9;

/// A virtqueue.
pub struct Ring {
    queue: Queue,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
}

impl Ring {
    fn new() -> Result<Ring> {
        Ok(Ring {
            queue: Queue::new(MAX_QUEUE)?,
            kick: None,
            call: None,
            enabled: true,
        })
    }

    /// The maximum number of buffers in it.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The descriptor that becomes readable when the guest has added buffers, if the virtqueue is in use.
    pub fn kick(&self) -> Option<BorrowedFd<'_>> {
        let running = self.enabled && self.queue.ready();
        self.kick.as_ref().filter(|_| running).map(File::as_fd)
    }

    /// Disables it until the guest's driver sets it up again.
    pub fn stop(&mut self) {
        self.queue.set_ready(false);
    }

    /// Resets that descriptor, so that it is no longer readable.
    pub fn clear_kick(&mut self) {
        if let Some(kick) = &mut self.kick {
            let _nothing_there = kick.read(&mut [0; 8]);
        }
    }

    /// The guest's next buffers; None if there are none, or the virtqueue is not in use.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>> {
        if self.kick().is_none() {
            return Ok(None);
        }
        Ok(self.queue.iter(memory)?.next())
    }

    /// Returns the last popped buffers to the virtqueue, unused.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns buffers to the guest, with `length` bytes written to them.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, length: usize) -> Result<()> {
        Ok(self.queue.add_used(memory, head, length.try_into()?)?)
    }

    /// Interrupts the guest after a push, if it requested that.
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        if self.queue.needs_notification(memory)?
            && let Some(call) = &mut self.call
        {
            call.write_all(&1_u64.to_ne_bytes())?;
        }
        Ok(())
    }

    /// Disables kicks from the guest.
    pub fn mute(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Enables kicks from the guest; true if there are buffers already.
    pub fn unmute(&mut self, memory: &GuestMemoryMmap) -> Result<bool> {
        Ok(self.queue.enable_notification(memory)?)
    }
}

/// A region of the guest's memory: its address in QEMU, its size, its address in the guest.
struct Region {
    qemu: u64,
    size: u64,
    guest: u64,
}

/// The connection to QEMU: its memory and virtqueues.
pub struct Frontend<const RINGS: usize> {
    stream: UnixStream,
    config: Vec<u8>,
    regions: Vec<Region>,
    /// The guest's memory, once QEMU has sent it.
    pub memory: Option<GuestMemoryMmap>,
    /// The device's virtqueues.
    pub rings: [Ring; RINGS],
}

impl<const RINGS: usize> Frontend<RINGS> {
    /// A device with this configuration space.
    pub fn new(stream: UnixStream, config: &[u8]) -> Result<Self> {
        let rings: Vec<_> = (0..RINGS).map(|_| Ring::new()).collect::<Result<_>>()?;
        Ok(Frontend {
            stream,
            config: config.into(),
            regions: vec![],
            memory: None,
            rings: rings.try_into().ok().context("as many as there are")?,
        })
    }

    /// The descriptor that becomes readable when there is a [request](Self::serve).
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Handles one request; false if QEMU has closed the connection.
    pub fn serve(&mut self) -> Result<bool> {
        let mut header = [0; 12];
        let Some(files) = self.receive(&mut header)? else {
            return Ok(false);
        };
        let [request, _flags, size] = words(&header)?;
        let mut payload = vec![0; usize::try_from(size)?];
        ensure!(payload.len() <= MAX_PAYLOAD, "a message of {size} bytes");
        self.stream.read_exact(&mut payload)?;
        let reply = self.reply(request, &payload, files);
        let reply = reply.with_context(|| format!("vhost-user request {request}"))?;
        if let Some(reply) = reply {
            let length = u32::try_from(reply.len())?;
            let header = [request, REPLY, length].map(u32::to_ne_bytes);
            self.stream
                .write_all(&[header.as_flattened(), &reply].concat())?;
        }
        Ok(true)
    }

    /// Fills `buffer`, and returns the files sent with its first byte; None at the end.
    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Vec<OwnedFd>>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(buffer)];
        let received = recvmsg(
            &self.stream,
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
        );
        // QEMU resets the connection if it leaves data unread.
        let bytes = received.map_or(0, |received| received.bytes);
        if bytes == 0 {
            return Ok(None);
        }
        ensure!(bytes == buffer.len(), "a header of {bytes} bytes");
        let mut files = vec![];
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        Ok(Some(files))
    }

    /// Handles a request; some need a reply.
    fn reply(
        &mut self,
        request: u32,
        payload: &[u8],
        files: Vec<OwnedFd>,
    ) -> Result<Option<Vec<u8>>> {
        let number = |number: u64| Ok(Some(number.to_ne_bytes().to_vec()));
        match request {
            GET_FEATURES => number(F_VERSION_1 | F_EVENT_IDX | F_PROTOCOL_FEATURES),
            GET_PROTOCOL_FEATURES => number(PROTOCOL_MULTIQUEUE | PROTOCOL_CONFIG),
            GET_QUEUE_NUM => number(RINGS as u64),
            GET_CONFIG => {
                let [offset, size, _flags] = words(payload)?;
                let range = offset as usize..offset as usize + size as usize;
                let config = self.config.get(range).context("beyond the configuration")?;
                let head = payload.get(..12).context("too short")?;
                Ok(Some([head, config].concat()))
            }
            GET_VRING_BASE => {
                let [index] = words(payload)?;
                let ring = self.ring(index)?;
                ring.queue.set_ready(false);
                ring.kick = None;
                let base = u32::from(ring.queue.next_avail());
                Ok(Some([index, base].map(u32::to_ne_bytes).concat()))
            }
            _ => self.set(request, payload, files).map(|()| None),
        }
    }

    fn set(&mut self, request: u32, payload: &[u8], mut files: Vec<OwnedFd>) -> Result<()> {
        match request {
            SET_OWNER | RESET_OWNER | SET_PROTOCOL_FEATURES | SET_VRING_ERR => {}
            SET_FEATURES => {
                let [low, high] = words(payload)?;
                let features = u64::from(high) << 32 | u64::from(low);
                for ring in &mut self.rings {
                    ring.queue.set_event_idx(features & F_EVENT_IDX != 0);
                }
            }
            SET_MEM_TABLE => self.map(payload, files)?,
            SET_VRING_NUM => {
                let [index, size] = words(payload)?;
                self.ring(index)?.queue.set_size(size.try_into()?);
            }
            SET_VRING_BASE => {
                let [index, base] = words(payload)?;
                self.ring(index)?.queue.set_next_avail(base.try_into()?);
            }
            SET_VRING_ADDR => self.set_addresses(payload)?,
            SET_VRING_ENABLE => {
                let [index, enabled] = words(payload)?;
                self.ring(index)?.enabled = enabled != 0;
            }
            SET_VRING_KICK | SET_VRING_CALL => {
                // The low byte is the number; without a file the guest would have to be polled.
                let [index] = words(payload)?;
                let ring = self.ring(index & 0xff)?;
                let file = files.pop().map(File::from);
                if request == SET_VRING_CALL {
                    ring.call = file;
                } else {
                    ring.queue.set_ready(file.is_some());
                    ring.kick = file;
                }
            }
            _ => bail!("not known"),
        }
        Ok(())
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let ring = self.rings.get_mut(index as usize);
        ring.with_context(|| format!("there is no virtqueue {index}"))
    }

    /// Maps the guest's memory. A region is guest address, size, address in QEMU, offset in the file.
    fn map(&mut self, payload: &[u8], files: Vec<OwnedFd>) -> Result<()> {
        let [count, _padding] = words(payload)?;
        ensure!(
            count as usize == files.len(),
            "{count} regions, {} files",
            files.len()
        );
        let mut ranges = vec![];
        self.regions.clear();
        for (region, file) in payload[8..].chunks_exact(32).zip(files) {
            let [guest, size, qemu, offset] = longs(region)?;
            self.regions.push(Region { qemu, size, guest });
            let file = FileOffset::new(File::from(file), offset);
            ranges.push((GuestAddress(guest), usize::try_from(size)?, Some(file)));
        }
        self.memory = Some(GuestMemoryMmap::from_ranges_with_files(ranges)?);
        Ok(())
    }

    /// Sets the addresses of a virtqueue's three parts; the guest may have used it before.
    fn set_addresses(&mut self, payload: &[u8]) -> Result<()> {
        let [index, _flags] = words(payload)?;
        let [descriptors, used, available, _log] = longs(payload.get(8..).context("too short")?)?;
        let descriptors = self.guest_address(descriptors)?;
        let used = self.guest_address(used)?;
        let available = self.guest_address(available)?;
        let memory = self.memory.as_ref().context("no memory yet")?;
        let queue = &mut self
            .rings
            .get_mut(index as usize)
            .context("no such virtqueue")?
            .queue;
        queue.try_set_desc_table_address(descriptors)?;
        queue.try_set_used_ring_address(used)?;
        queue.try_set_avail_ring_address(available)?;
        let next_used = queue.used_idx(memory, std::sync::atomic::Ordering::Acquire)?;
        queue.set_next_used(next_used.0);
        Ok(())
    }

    fn guest_address(&self, qemu: u64) -> Result<GuestAddress> {
        let region = self
            .regions
            .iter()
            .find(|region| (region.qemu..region.qemu.saturating_add(region.size)).contains(&qemu));
        let region = region.context("outside of the guest's memory")?;
        Ok(GuestAddress(region.guest + (qemu - region.qemu)))
    }
}

/// The first 32-bit words.
fn words<const COUNT: usize>(bytes: &[u8]) -> Result<[u32; COUNT]> {
    let mut words = [0; COUNT];
    ensure!(bytes.len() >= 4 * COUNT, "too short");
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    Ok(words)
}

/// The first 64-bit words.
fn longs<const COUNT: usize>(bytes: &[u8]) -> Result<[u64; COUNT]> {
    let mut longs = [0; COUNT];
    ensure!(bytes.len() >= 8 * COUNT, "too short");
    for (long, bytes) in longs.iter_mut().zip(bytes.as_chunks().0) {
        *long = u64::from_ne_bytes(*bytes);
    }
    Ok(longs)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use vm_memory::Bytes;

    /// Number of descriptors of a [`Driver`]'s virtqueue.
    pub const SIZE: u16 = 16;

    /// A descriptor's flag: the device writes.
    pub const WRITE: u16 = 2;

    /// The guest's side of a virtqueue. (virtio specification 2.7)
    pub struct Driver {
        memory: GuestMemoryMmap,
        base: u64,
        kick: File,
        /// Free-running indices: of descriptors, chains made available, and chains seen used.
        descriptors: u16,
        available: u16,
        used: u16,
    }

    impl Driver {
        /// Sets `ring` up from this address on.
        pub fn new(memory: &GuestMemoryMmap, base: u64, ring: &mut Ring) -> Driver {
            let at = |offset| GuestAddress(base + offset);
            memory.write_slice(&[0; LENGTH], at(0)).unwrap();
            let queue = &mut ring.queue;
            queue.set_size(SIZE);
            queue.set_next_avail(0);
            queue.set_next_used(0);
            queue.try_set_desc_table_address(at(0)).unwrap();
            queue.try_set_avail_ring_address(at(AVAILABLE)).unwrap();
            queue.try_set_used_ring_address(at(USED)).unwrap();
            queue.set_ready(true);
            let kick = File::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
            ring.kick = Some(kick.try_clone().unwrap());
            Driver {
                memory: memory.clone(),
                base,
                kick,
                descriptors: 0,
                available: 0,
                used: 0,
            }
        }

        /// Sets `ring` up so that a returned chain is available again: its used ring is the available ring.
        /// The chain has one buffer of this length.
        pub fn endless(memory: &GuestMemoryMmap, base: u64, ring: &mut Ring, buffer: (u64, u32)) {
            let mut driver = Driver::new(memory, base, ring);
            let queue = &mut ring.queue;
            queue
                .try_set_used_ring_address(GuestAddress(base + AVAILABLE))
                .unwrap();
            queue.set_next_used(SIZE);
            driver.add(&[(buffer.0, buffer.1, 0)]);
            driver.set_index(SIZE);
        }

        /// Makes a chain of these buffers available: address, length, flags.
        pub fn add(&mut self, buffers: &[(u64, u32, u16)]) {
            let head = self.descriptors % SIZE;
            for (index, (address, length, flags)) in buffers.iter().enumerate() {
                let more = u16::from(index + 1 < buffers.len());
                let next = (self.descriptors + 1) % SIZE;
                let at = u64::from(self.descriptors % SIZE) * 16;
                self.write(at, &address.to_le_bytes());
                self.write(at + 8, &length.to_le_bytes());
                self.write(at + 12, &(flags | more).to_le_bytes());
                self.write(at + 14, &next.to_le_bytes());
                self.descriptors += 1;
            }
            self.offer(head);
        }

        /// Makes the chain that starts with this descriptor available.
        pub fn offer(&mut self, head: u16) {
            let at = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
            self.write(at, &head.to_le_bytes());
            self.available += 1;
            self.set_index(self.available);
        }

        /// Sets the available index.
        pub fn set_index(&mut self, index: u16) {
            self.write(AVAILABLE + 2, &index.to_le_bytes());
            self.kick.write_all(&1_u64.to_ne_bytes()).unwrap();
        }

        /// The written length of the next chain that the device has returned.
        pub fn take(&mut self) -> Option<u32> {
            let mut index = [0; 2];
            let at = |offset| GuestAddress(self.base + offset);
            self.memory.read_slice(&mut index, at(USED + 2)).unwrap();
            if u16::from_le_bytes(index) == self.used {
                return None;
            }
            let mut length = [0; 4];
            let element = USED + 4 + u64::from(self.used % SIZE) * 8;
            let length_at = at(element + 4);
            self.memory.read_slice(&mut length, length_at).unwrap();
            self.used += 1;
            Some(u32::from_le_bytes(length))
        }

        fn write(&self, offset: u64, bytes: &[u8]) {
            let at = GuestAddress(self.base + offset);
            self.memory.write_slice(bytes, at).unwrap();
        }
    }

    /// Offsets of the virtqueue's other parts.
    const AVAILABLE: u64 = 0x200;
    const USED: u64 = 0x300;
    const LENGTH: usize = 0x400;
}
