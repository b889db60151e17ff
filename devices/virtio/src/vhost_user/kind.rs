//! What differs between kinds of devices whose queues a back-end serves: features, queues,
//! configuration space, and what a driver is answered while there is no back-end.

use testudo_memory::RamView;
use virtio_bindings::virtio_ids as ids;
use virtio_bindings::{virtio_blk as blk, virtio_net as net};

use super::message::MAX_CONFIG;
use crate::model::{Shape, features};
use crate::queue::Chain;

/// A kind of device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VhostUserKind {
    /// A network device with this address.
    Net {
        /// The guest's hardware address.
        mac: [u8; 6],
    },
    /// A file system.
    Fs {
        /// By which the guest mounts it: 1 to 36 bytes.
        tag: String,
    },
    /// A disk.
    Blk,
}

/// What is asked of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserOptions {
    /// What it is.
    pub kind: VhostUserKind,
    /// Request queues of a disk or file system; pairs of queues of a network device.
    pub queues: u16,
    /// Descriptors in each: a power of two.
    pub queue_size: u16,
    /// Go on with a back-end that comes back.
    pub reconnect: bool,
}

/// The link of a network device, in its `status`.
const LINK_UP: u16 = 1;

const NET_BACKEND: &[u32] = &[
    net::VIRTIO_NET_F_CSUM,
    net::VIRTIO_NET_F_GUEST_CSUM,
    net::VIRTIO_NET_F_GUEST_TSO4,
    net::VIRTIO_NET_F_GUEST_TSO6,
    net::VIRTIO_NET_F_GUEST_ECN,
    net::VIRTIO_NET_F_GUEST_UFO,
    net::VIRTIO_NET_F_HOST_TSO4,
    net::VIRTIO_NET_F_HOST_TSO6,
    net::VIRTIO_NET_F_HOST_ECN,
    net::VIRTIO_NET_F_HOST_UFO,
    net::VIRTIO_NET_F_MRG_RXBUF,
];

const BLK_BACKEND: &[u32] = &[
    blk::VIRTIO_BLK_F_SIZE_MAX,
    blk::VIRTIO_BLK_F_SEG_MAX,
    blk::VIRTIO_BLK_F_GEOMETRY,
    blk::VIRTIO_BLK_F_RO,
    blk::VIRTIO_BLK_F_BLK_SIZE,
    blk::VIRTIO_BLK_F_FLUSH,
    blk::VIRTIO_BLK_F_TOPOLOGY,
    blk::VIRTIO_BLK_F_CONFIG_WCE,
    blk::VIRTIO_BLK_F_DISCARD,
    blk::VIRTIO_BLK_F_WRITE_ZEROES,
];

/// `struct virtio_blk_config` up to its `unused1`, and where its `num_queues` is.
const BLK_CONFIG: usize = 60;
const BLK_WCE: u64 = 32;
const BLK_NUM_QUEUES: usize = 34;
const BLK_STATUS_IOERR: u8 = 1;

const FS_TAG: usize = 36;
/// `struct fuse_in_header` begins with length and opcode, then comes what answers are known by.
const FUSE_UNIQUE: u32 = 8;
const FUSE_OUT_HEADER: u32 = 16;
/// What a FUSE request is answered when its server is gone: ENOTCONN.
const FUSE_NOT_CONNECTED: i32 = -107;

fn mask(bits: &[u32]) -> u64 {
    bits.iter()
        .fold(0, |mask, bit| mask | 1_u64.checked_shl(*bit).unwrap_or(0))
}

/// A kind of device with its size.
#[derive(Debug, Clone)]
pub(super) struct Profile {
    options: VhostUserOptions,
}

impl Profile {
    pub(super) fn new(options: VhostUserOptions) -> Self {
        Self { options }
    }

    pub(super) fn options(&self) -> &VhostUserOptions {
        &self.options
    }

    /// The name for messages.
    pub(super) fn name(&self) -> &'static str {
        match self.options.kind {
            VhostUserKind::Net { .. } => "net",
            VhostUserKind::Fs { .. } => "fs",
            VhostUserKind::Blk => "blk",
        }
    }

    /// Queues that the back-end serves.
    pub(super) fn rings(&self) -> u16 {
        let queues = self.options.queues;
        match self.options.kind {
            VhostUserKind::Net { .. } => queues.saturating_mul(2),
            VhostUserKind::Fs { .. } => queues.saturating_add(1),
            VhostUserKind::Blk => queues,
        }
    }

    /// Queues that a back-end without MQ has.
    pub(super) fn queues_without_mq(&self) -> u64 {
        match self.options.kind {
            VhostUserKind::Net { .. } => 2,
            // A file system's back-end need not speak of it.
            VhostUserKind::Fs { .. } => self.rings().into(),
            VhostUserKind::Blk => 1,
        }
    }

    /// The queue by which a driver says how many pairs it uses. It is served here.
    pub(super) fn control_queue(&self) -> Option<u16> {
        let net = matches!(self.options.kind, VhostUserKind::Net { .. });
        (net && self.options.queues > 1).then(|| self.rings())
    }

    /// Queues that are served before the driver asks for more.
    pub(super) fn enabled_at_first(&self) -> u16 {
        match self.options.kind {
            VhostUserKind::Net { .. } => 2,
            _ => self.rings(),
        }
    }

    /// Whether the configuration space is the back-end's.
    pub(super) fn asks_for_config(&self) -> bool {
        matches!(self.options.kind, VhostUserKind::Blk)
    }

    /// Features that are the back-end's to offer.
    pub(super) fn backend_features(&self) -> u64 {
        let own = match self.options.kind {
            VhostUserKind::Net { .. } => mask(NET_BACKEND),
            VhostUserKind::Fs { .. } => 0,
            VhostUserKind::Blk if self.options.queues > 1 => {
                mask(BLK_BACKEND) | mask(&[blk::VIRTIO_BLK_F_MQ])
            }
            VhostUserKind::Blk => mask(BLK_BACKEND),
        };
        own | features::COMMON
    }

    /// Features that this side sees to.
    fn own_features(&self) -> u64 {
        let VhostUserKind::Net { .. } = self.options.kind else {
            return 0;
        };
        let address = mask(&[net::VIRTIO_NET_F_MAC, net::VIRTIO_NET_F_STATUS]);
        if self.control_queue().is_some() {
            address | mask(&[net::VIRTIO_NET_F_CTRL_VQ, net::VIRTIO_NET_F_MQ])
        } else {
            address
        }
    }

    /// The device with what is `offered` by the back-end.
    pub(super) fn shape(&self, offered: u64) -> Shape {
        let device_type = match self.options.kind {
            VhostUserKind::Net { .. } => ids::VIRTIO_ID_NET,
            VhostUserKind::Fs { .. } => ids::VIRTIO_ID_FS,
            VhostUserKind::Blk => ids::VIRTIO_ID_BLOCK,
        };
        let from_backend = offered & self.backend_features();
        let mut queues = vec![self.options.queue_size; usize::from(self.rings())];
        queues.extend(self.control_queue().map(|_| 64));
        Shape {
            name: self.name(),
            device_type: u16::try_from(device_type).unwrap_or_default(),
            features: (from_backend & !features::COMMON) | self.own_features(),
            lacks: features::COMMON & !offered,
            queues,
            config_len: u32::try_from(self.config_len()).unwrap_or(0),
            ..Shape::default()
        }
    }

    pub(super) fn config_len(&self) -> usize {
        let len = match self.options.kind {
            VhostUserKind::Net { .. } => 12,
            VhostUserKind::Fs { .. } => FS_TAG.saturating_add(4),
            VhostUserKind::Blk => BLK_CONFIG,
        };
        len.min(MAX_CONFIG)
    }

    /// The configuration space; `backend` is what the back-end's says.
    pub(super) fn config(&self, backend: &[u8], connected: bool) -> Vec<u8> {
        let queues = self.options.queues;
        match &self.options.kind {
            VhostUserKind::Net { mac } => {
                let status = if connected { LINK_UP } else { 0 };
                let mut config = mac.to_vec();
                config.extend(status.to_le_bytes());
                config.extend(queues.to_le_bytes());
                config.extend(0_u16.to_le_bytes());
                config
            }
            VhostUserKind::Fs { tag } => {
                let mut config = tag.as_bytes().to_vec();
                config.resize(FS_TAG, 0);
                config.extend(u32::from(queues).to_le_bytes());
                config
            }
            VhostUserKind::Blk => {
                let mut config = backend.to_vec();
                config.resize(BLK_CONFIG, 0);
                let end = BLK_NUM_QUEUES.saturating_add(2);
                if let Some(field) = config.get_mut(BLK_NUM_QUEUES..end) {
                    field.copy_from_slice(&queues.to_le_bytes());
                }
                config
            }
        }
    }

    /// Whether a driver's write there is for the back-end: the disk's write cache.
    pub(super) fn config_writable(&self, offset: u64, len: usize) -> bool {
        self.options.kind == VhostUserKind::Blk && offset == BLK_WCE && len == 1
    }

    /// Whether requests on queue `index` are answered while there is no back-end: buffers for what
    /// comes in from a network stay where they are.
    pub(super) fn answers(&self, index: u16) -> bool {
        match self.options.kind {
            VhostUserKind::Net { .. } => index % 2 == 1,
            _ => true,
        }
    }

    /// Answers a request that no back-end will; returns how many bytes were written.
    pub(super) fn refuse(&self, ram: &RamView, chain: &Chain) -> u32 {
        match self.options.kind {
            // A packet that is sent into nothing.
            VhostUserKind::Net { .. } => 0,
            VhostUserKind::Fs { .. } => refuse_fuse(ram, chain),
            VhostUserKind::Blk => {
                let len = chain.writable_len();
                let status = len.checked_sub(1);
                let written = status.map(|at| chain.write(ram, at, &[BLK_STATUS_IOERR]));
                if matches!(written, Some(Ok(1))) {
                    len
                } else {
                    0
                }
            }
        }
    }
}

fn refuse_fuse(ram: &RamView, chain: &Chain) -> u32 {
    let mut unique = [0; 8];
    let asked = chain.read(ram, FUSE_UNIQUE, &mut unique);
    // What asks for no answer has no room for one.
    if !matches!(asked, Ok(8)) || chain.writable_len() < FUSE_OUT_HEADER {
        return 0;
    }
    let mut answer = FUSE_OUT_HEADER.to_le_bytes().to_vec();
    answer.extend(FUSE_NOT_CONNECTED.to_le_bytes());
    answer.extend(unique);
    match chain.write(ram, 0, &answer) {
        Ok(16) => FUSE_OUT_HEADER,
        _ => 0,
    }
}
