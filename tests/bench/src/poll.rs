//! Readiness of sockets, and the clock that mock and load generator share.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::time::{ClockId, clock_gettime};

/// Events taken from the kernel at once.
const BATCH: usize = 1024;

/// `CLOCK_MONOTONIC` in nanoseconds: the same in all processes of a host.
pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let (seconds, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanos
}

/// What a socket is ready for, and whose it is.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    pub token: usize,
    pub to_read: bool,
    pub to_write: bool,
}

pub struct Poll {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Poll {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, events: Vec::with_capacity(BATCH) })
    }

    pub fn add(&self, socket: impl AsFd, token: usize) -> io::Result<()> {
        let read = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        Ok(epoll::add(&self.epoll, socket, epoll::EventData::new_u64(token as u64), read)?)
    }

    /// Whether the socket is also waited for to take more.
    pub fn wants_write(&self, socket: impl AsFd, token: usize, wanted: bool) -> io::Result<()> {
        let mut flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        flags.set(epoll::EventFlags::OUT, wanted);
        Ok(epoll::modify(&self.epoll, socket, epoll::EventData::new_u64(token as u64), flags)?)
    }

    /// Waits at most so many nanoseconds and replaces what is in `ready`.
    pub fn wait(&mut self, timeout_ns: Option<u64>, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        self.events.clear();
        let timeout = timeout_ns.map(|nanos| Timespec::try_from(Duration::from_nanos(nanos)));
        let timeout = timeout.transpose().map_err(io::Error::other)?;
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        ready.extend(self.events.iter().map(|event| {
            let flags = event.flags;
            let data = event.data;
            Ready {
                token: usize::try_from(data.u64()).expect("tokens are indices"),
                to_read: flags.intersects(!epoll::EventFlags::OUT),
                to_write: flags.contains(epoll::EventFlags::OUT),
            }
        }));
        Ok(())
    }
}

/// Connects to a loopback address; such connects end at once.
pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// `None`: nothing to read now. 0: end of the stream.
pub fn read(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    would_block(stream.read(buffer))
}

/// `None`: no room now.
pub fn write(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<Option<usize>> {
    would_block(stream.write(bytes))
}

fn would_block(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
