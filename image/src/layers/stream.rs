//! A layer's bytes, unpacked by a thread of their own while the caller does something with those before.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

/// Pieces that wait to be read, and how large one is.
const DEPTH: usize = 8;
const PIECE: usize = 256 << 10;
/// What a zstd frame may ask to have in memory: 128 MiB, as the zstd command allows.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How a layer is packed. Told by its first bytes: media types are often wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

/// The reading end.
pub(super) struct Stream {
    pieces: Receiver<io::Result<Vec<u8>>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Stream {
    /// Starts the thread. It ends when the input does, or when nobody reads any more.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        input: Box<dyn Read + Send>,
    ) -> io::Result<Self> {
        let (to, pieces) = sync_channel(DEPTH);
        std::thread::Builder::new()
            .name("layer".into())
            .spawn_scoped(scope, move || {
                if let Err(error) = pump(input, &to) {
                    // If nobody listens, nobody needs to know.
                    let _ = to.send(Err(error));
                }
            })?;
        Ok(Self {
            pieces,
            current: Vec::new(),
            at: 0,
            ended: false,
        })
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.current.len() {
            if self.ended {
                return Ok(0);
            }
            match self.pieces.recv() {
                Ok(Ok(piece)) => {
                    self.current = piece;
                    self.at = 0;
                }
                Ok(Err(error)) => {
                    self.ended = true;
                    return Err(error);
                }
                Err(_) => self.ended = true,
            }
        }
        let rest = self.current.get(self.at..).unwrap_or_default();
        let n = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
            to.copy_from_slice(from);
        }
        self.at += n;
        Ok(n)
    }
}

fn pump(input: Box<dyn Read + Send>, to: &SyncSender<io::Result<Vec<u8>>>) -> io::Result<()> {
    let mut unpacked = unpacked(input)?;
    loop {
        let mut piece = vec![0; PIECE];
        let mut filled = 0;
        while filled < PIECE {
            match unpacked.read(piece.get_mut(filled..).unwrap_or_default()) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        piece.truncate(filled);
        if filled == 0 || to.send(Ok(piece)).is_err() {
            return Ok(());
        }
    }
}

/// Around an input of any packing.
pub(crate) fn unpacked(input: Box<dyn Read + Send>) -> io::Result<Box<dyn Read + Send>> {
    let mut input = BufReader::with_capacity(PIECE, input);
    Ok(match packing(input.fill_buf()?) {
        Packing::None => Box::new(input),
        // Several members are one stream (pigz, eStargz).
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Packing::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    })
}

/// Do these bytes begin something compressed?
pub(crate) fn is_packed(first: &[u8]) -> bool {
    packing(first) != Packing::None
}

fn packing(first: &[u8]) -> Packing {
    match first {
        [0x1f, 0x8b, ..] => Packing::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
        // A skippable frame, as zstd:chunked begins with.
        [b, 0x2a, 0x4d, 0x18, ..] if b & 0xf0 == 0x50 => Packing::Zstd,
        _ => Packing::None,
    }
}
