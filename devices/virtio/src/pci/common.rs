//! The common configuration structure (virtio 1.2 §4.1.4.3).
//!
//! A read of any width and alignment is served from the registers' image. A write takes effect
//! only as the specification has drivers make it: a whole field, or one half of a 64-bit field.

use super::{VirtioPci, layout};
use crate::queue::QueueRegisters;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const DEVICE_STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// One field's worth of a write.
enum Value {
    Byte(u8),
    Word(u16),
    Dword(u32),
    Qword(u64),
}

impl Value {
    fn new(data: &[u8]) -> Option<Self> {
        Some(match *data {
            [b] => Self::Byte(b),
            [a, b] => Self::Word(u16::from_le_bytes([a, b])),
            [a, b, c, d] => Self::Dword(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => Self::Qword(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
            _ => return None,
        })
    }
}

impl VirtioPci {
    pub(super) fn common_read(&self, offset: u64, data: &mut [u8]) {
        let image = self.common_image();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(data.len());
        let legal = end <= usize::try_from(layout::COMMON_LEN).unwrap_or(0);
        match image.get(start..end).filter(|_| legal) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    fn common_image(&self) -> Vec<u8> {
        let device = &self.device;
        let absent = QueueRegisters {
            max_size: 0,
            size: 0,
            vector: 0,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        };
        let (queue, notify_off) = match device.queue() {
            Some(queue) => (queue, device.selected()),
            None => (&absent, 0),
        };
        let mut image = Vec::with_capacity(64);
        image.extend(device.device_feature_page().to_le_bytes());
        image.extend(device.device_features().to_le_bytes());
        image.extend(device.driver_feature_page().to_le_bytes());
        image.extend(device.driver_features().to_le_bytes());
        image.extend(self.config_vector.to_le_bytes());
        image.extend(device.queue_count().to_le_bytes());
        image.extend([device.status(), device.config_generation()]);
        image.extend(device.selected().to_le_bytes());
        image.extend(queue.size.to_le_bytes());
        image.extend(queue.vector.to_le_bytes());
        image.extend(u16::from(queue.enabled).to_le_bytes());
        image.extend(notify_off.to_le_bytes());
        image.extend(queue.descriptors.to_le_bytes());
        image.extend(queue.driver.to_le_bytes());
        image.extend(queue.device.to_le_bytes());
        // queue_notify_data and queue_reset belong to features that are not offered.
        image.extend([0; 4]);
        image
    }

    pub(super) fn common_write(&mut self, offset: u64, data: &[u8]) {
        let Some(value) = Value::new(data) else {
            return;
        };
        match (offset, value) {
            (DEVICE_FEATURE_SELECT, Value::Dword(page)) => self.device.select_device_features(page),
            (DRIVER_FEATURE_SELECT, Value::Dword(page)) => self.device.select_driver_features(page),
            (DRIVER_FEATURE, Value::Dword(bits)) => self.device.accept_features(bits),
            (CONFIG_VECTOR, Value::Word(vector)) if !self.device.frozen() => {
                self.config_vector = self.checked_vector(vector);
            }
            (DEVICE_STATUS, Value::Byte(status)) => self.write_status(status),
            (QUEUE_SELECT, Value::Word(index)) => self.device.select_queue(index),
            (QUEUE_VECTOR, Value::Word(vector)) => {
                let vector = self.checked_vector(vector);
                if let Some(queue) = self.device.queue_mut() {
                    queue.vector = vector;
                }
            }
            (QUEUE_SIZE..=QUEUE_DEVICE_END, value) => {
                if let Some(queue) = self.device.queue_mut() {
                    queue_write(queue, offset, &value);
                }
            }
            _ => {}
        }
    }
}

const QUEUE_DEVICE_END: u64 = QUEUE_DEVICE + 7;

fn queue_write(queue: &mut QueueRegisters, offset: u64, value: &Value) {
    match (offset, value) {
        (QUEUE_SIZE, Value::Word(size)) => queue.size = *size,
        // A driver never disables a queue but by reset.
        (QUEUE_ENABLE, Value::Word(1)) => queue.enabled = true,
        _ => {
            let field = match offset & !7 {
                QUEUE_DESC => &mut queue.descriptors,
                QUEUE_DRIVER => &mut queue.driver,
                QUEUE_DEVICE => &mut queue.device,
                _ => return,
            };
            match (offset & 7, value) {
                (0, Value::Qword(address)) => *field = *address,
                (0, Value::Dword(low)) => *field = (*field & !0xffff_ffff) | u64::from(*low),
                (4, Value::Dword(high)) => {
                    *field = (*field & 0xffff_ffff) | (u64::from(*high) << 32);
                }
                _ => {}
            }
        }
    }
}
