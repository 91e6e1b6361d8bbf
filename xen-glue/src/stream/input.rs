//! Reads exactly what is asked for, and knows at which byte of the stream it is.
//!
//! Invariant: never a byte more than asked for is taken, since what follows the stream on the same descriptor is
//! somebody else's.
#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut, Read};

use mover::units::u64_of;

use super::error::{Fault, StreamError};
use super::limits::GROWTH_BYTES;

#[derive(Debug)]
pub(crate) struct Input<R> {
    pub(crate) inner: R,
    offset: u64,
}

impl<R: Read> Input<R> {
    pub(crate) fn new(inner: R, offset: u64) -> Self {
        Self { inner, offset }
    }

    /// Bytes taken so far, and those before it.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Fills `buffer`, a part of `what`.
    pub(crate) fn exact(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), StreamError> {
        let wanted = u64_of(buffer.len());
        self.pull(wanted, what, |inner, done| {
            let done = usize::try_from(done).unwrap_or(usize::MAX);
            inner.read(&mut buffer[done..])
        })
    }

    /// Fills `buffers` one after the other.
    pub(crate) fn vectored(
        &mut self,
        mut buffers: &mut [IoSliceMut<'_>],
        what: &'static str,
    ) -> Result<(), StreamError> {
        let wanted = buffers.iter().map(|buffer| u64_of(buffer.len())).sum();
        IoSliceMut::advance_slices(&mut buffers, 0);
        let mut before = 0;
        self.pull(wanted, what, |inner, done| {
            let step = usize::try_from(done - before).unwrap_or(usize::MAX);
            IoSliceMut::advance_slices(&mut buffers, step);
            before = done;
            inner.read_vectored(buffers)
        })
    }

    /// Has `read` called until `wanted` bytes have come. It gets the inner reader and how many have, and returns how
    /// many more it got, 0 at the end.
    pub(crate) fn pull(
        &mut self,
        wanted: u64,
        what: &'static str,
        mut read: impl FnMut(&mut R, u64) -> io::Result<usize>,
    ) -> Result<(), StreamError> {
        let mut done = 0;
        while done < wanted {
            match read(&mut self.inner, done) {
                Ok(0) => {
                    return Err(self.fault(Fault::Truncated { what, missing: wanted - done }));
                }
                Ok(n) => {
                    let n = u64_of(n);
                    assert!(
                        n <= wanted - done,
                        "a reader gave {n} bytes where {} were asked for",
                        wanted - done
                    );
                    done += n;
                    self.offset += n;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.fault(Fault::Io { doing: "reading the stream", source })),
            }
        }
        Ok(())
    }

    /// `length` bytes, held in memory that grows as they arrive.
    pub(crate) fn body(&mut self, length: usize, what: &'static str) -> Result<Vec<u8>, StreamError> {
        let mut out = Vec::new();
        self.body_into(&mut out, length, what).map(|()| out)
    }

    /// As [`Self::body`], into a buffer that is used again.
    pub(crate) fn body_into(
        &mut self,
        out: &mut Vec<u8>,
        length: usize,
        what: &'static str,
    ) -> Result<(), StreamError> {
        out.clear();
        while out.len() < length {
            let from = out.len();
            out.resize(length.min(from + GROWTH_BYTES.max(from)), 0);
            self.exact(&mut out[from..], what)?;
        }
        Ok(())
    }

    /// Takes `length` bytes and drops them.
    pub(crate) fn skip(&mut self, mut length: u64, what: &'static str) -> Result<(), StreamError> {
        let mut scratch = [0; 4096];
        while length > 0 {
            let piece = usize::try_from(length).unwrap_or(usize::MAX).min(scratch.len());
            self.exact(&mut scratch[..piece], what)?;
            length -= u64_of(piece);
        }
        Ok(())
    }

    /// Whether the input is at its end; takes a byte if it is not.
    pub(crate) fn at_end(&mut self) -> Result<bool, StreamError> {
        let offset = self.offset;
        match self.exact(&mut [0], "the end of the file") {
            Ok(()) => {
                self.offset = offset;
                Ok(false)
            }
            Err(StreamError { fault: Fault::Truncated { .. }, .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Goes on counting from where another reader of the same descriptor has stopped.
    pub(crate) fn continue_at(&mut self, offset: u64) {
        self.offset = offset;
    }

    pub(crate) fn fault(&self, fault: Fault) -> StreamError {
        StreamError::new(self.offset, fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives what it has a few bytes at a time, with interruptions.
    struct Drip<'a>(&'a [u8], usize);

    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 += 1;
            if self.1.is_multiple_of(3) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let n = self.1.min(buffer.len()).min(3);
            self.0.read(&mut buffer[..n])
        }
    }

    #[test]
    fn short_reads_and_interruptions_are_carried_on_from() {
        let bytes: Vec<u8> = (0..200).collect();
        let mut input = Input::new(Drip(&bytes, 0), 1000);
        let (mut a, mut b, mut c) = ([0; 7], [0; 0], [0; 50]);
        let mut slices = [&mut a[..], &mut b[..], &mut c[..]].map(IoSliceMut::new);
        input.vectored(&mut slices, "a test").unwrap();
        assert_eq!([&a[..], &c[..]].concat(), bytes[..57]);
        assert_eq!(input.offset(), 1057);
        assert_eq!(input.body(100, "a test").unwrap(), bytes[57..157]);
        input.skip(10, "a test").unwrap();
        let error = input.body(50, "the rest").unwrap_err();
        assert_eq!(error.offset, 1200);
        assert!(matches!(error.fault, Fault::Truncated { what: "the rest", missing: 17 }), "{error}");
        assert!(input.at_end().unwrap());
    }
}
