//! An OpenAI-compatible upstream that costs next to nothing.
//!
//! It is told how to behave while it runs, so that the proxy in front stays up:
//! `POST /__control?delay_us=20000&events=256&gap_us=0`, where `delay_us` passes before a unary answer or a
//! stream's first event, `events` is the number of content events of a stream, and `gap_us` lies between two
//! of them (0: as fast as the socket takes them, still one write each).

mod canned;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};

use memchr::memmem::Finder;

use self::canned::{Canned, STAMP_DIGITS, response};
use crate::http::{Event, Head, Reader};
use crate::poll::{self, Poll};

pub use canned::STAMP;

const LISTENER: usize = usize::MAX >> 1;

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long, default_value = "127.0.0.1:9100")]
    listen: SocketAddr,
}

#[derive(Clone, Copy)]
struct Behaviour {
    delay_ns: u64,
    events: u32,
    gap_ns: u64,
}

struct Stream {
    sent: u32,
    total: u32,
    gap_ns: u64,
    start_ns: u64,
    usage: bool,
}

struct Connection {
    socket: TcpStream,
    /// Tells a timer of this connection from one of an earlier connection in the same slot.
    serial: u64,
    reader: Reader,
    head: Head,
    body: Vec<u8>,
    unsent: Vec<u8>,
    stream: Option<Stream>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wake {
    Unary,
    StreamStart { usage: bool },
    NextEvent,
}

/// Ordered by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Timer {
    at_ns: u64,
    slot: usize,
    serial: u64,
    wake: Wake,
}

struct Server {
    poll: Poll,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    timers: BinaryHeap<Reverse<Timer>>,
    /// Streams without a gap whose socket has room.
    hot: Vec<usize>,
    canned: Canned,
    behaviour: Behaviour,
    serial: u64,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(arguments.listen.ip().is_loopback(), "the mock listens on loopback only");
    let listener = TcpListener::bind(arguments.listen)?;
    listener.set_nonblocking(true)?;
    let poll = Poll::new()?;
    poll.add(&listener, LISTENER)?;
    let mut server = Server {
        poll,
        connections: Vec::new(),
        free: Vec::new(),
        timers: BinaryHeap::new(),
        hot: Vec::new(),
        canned: Canned::new(),
        behaviour: Behaviour { delay_ns: 0, events: 256, gap_ns: 0 },
        serial: 0,
    };
    server.serve(&listener)
}

impl Server {
    fn serve(&mut self, listener: &TcpListener) -> anyhow::Result<()> {
        let (mut ready, mut hot, mut scratch) = (Vec::new(), Vec::new(), vec![0; 256 * 1024]);
        loop {
            self.poll.wait(self.time_to_wait(), &mut ready)?;
            for event in ready.drain(..) {
                if event.token == LISTENER {
                    self.accept(listener)?;
                    continue;
                }
                if event.to_write {
                    self.flush(event.token);
                }
                if event.to_read {
                    self.receive(event.token, &mut scratch);
                }
            }
            self.run_timers();
            std::mem::swap(&mut hot, &mut self.hot);
            for slot in hot.drain(..) {
                self.wake(slot, Wake::NextEvent, 0);
            }
        }
    }

    /// Nanoseconds to the next timer.
    fn time_to_wait(&self) -> Option<u64> {
        if !self.hot.is_empty() {
            return Some(0);
        }
        self.timers.peek().map(|timer| timer.0.at_ns.saturating_sub(poll::now_ns()))
    }

    fn run_timers(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        let now = poll::now_ns();
        while self.timers.peek().is_some_and(|timer| timer.0.at_ns <= now) {
            let Some(Reverse(timer)) = self.timers.pop() else { return };
            let alive = self.connections[timer.slot].as_ref();
            if alive.is_some_and(|connection| connection.serial == timer.serial) {
                self.wake(timer.slot, timer.wake, timer.at_ns);
            }
        }
    }

    fn accept(&mut self, listener: &TcpListener) -> io::Result<()> {
        while let Ok((socket, _)) = listener.accept() {
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            self.serial += 1;
            let slot = self.free.pop().unwrap_or(self.connections.len());
            self.poll.add(&socket, slot)?;
            if slot == self.connections.len() {
                self.connections.push(None);
            }
            self.connections[slot] = Some(Connection {
                socket,
                serial: self.serial,
                reader: Reader::default(),
                head: Head::default(),
                body: Vec::new(),
                unsent: Vec::new(),
                stream: None,
            });
        }
        Ok(())
    }

    fn close(&mut self, slot: usize) {
        if self.connections[slot].take().is_some() {
            self.free.push(slot);
        }
    }

    fn receive(&mut self, slot: usize, scratch: &mut [u8]) {
        loop {
            let Some(connection) = self.connections[slot].as_mut() else { return };
            let count = match poll::read(&connection.socket, scratch) {
                Ok(None) => return,
                Ok(Some(0)) | Err(_) => return self.close(slot),
                Ok(Some(count)) => count,
            };
            let Connection { reader, head, body, .. } = connection;
            let mut complete = false;
            let fed = reader.feed(&scratch[..count], |event| match event {
                Event::Head(read) => {
                    head.clone_from(read);
                    body.clear();
                }
                Event::Data(data) => body.extend_from_slice(data),
                Event::End => complete = true,
            });
            if fed.is_err() {
                return self.close(slot);
            }
            if complete {
                self.answer(slot);
            }
            if count < scratch.len() {
                return;
            }
        }
    }

    fn answer(&mut self, slot: usize) {
        let Some(connection) = self.connections[slot].as_mut() else { return };
        let target = std::mem::take(&mut connection.head.target);
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        match path {
            "/__control" => {
                self.behaviour = self.behaviour.with(query);
                self.send(slot, &response("200 OK", "{}"));
            }
            "/v1/chat/completions" => self.complete(slot),
            "/v1/models" => self.send_canned(slot, |canned| &mut canned.models),
            "/health" => self.send_canned(slot, |canned| &mut canned.health),
            _ => self.send_canned(slot, |canned| &mut canned.missing),
        }
    }

    fn complete(&mut self, slot: usize) {
        let Some(connection) = self.connections[slot].as_ref() else { return };
        let wake = if is_true(&connection.body, "\"stream\"") {
            Wake::StreamStart { usage: is_true(&connection.body, "\"include_usage\"") }
        } else {
            Wake::Unary
        };
        let now = poll::now_ns();
        if self.behaviour.delay_ns == 0 {
            return self.wake(slot, wake, now);
        }
        let serial = connection.serial;
        self.timers.push(Reverse(Timer { at_ns: now + self.behaviour.delay_ns, slot, serial, wake }));
    }

    fn wake(&mut self, slot: usize, wake: Wake, at_ns: u64) {
        match wake {
            Wake::Unary => self.send_canned(slot, |canned| &mut canned.unary),
            Wake::StreamStart { usage } => {
                let Behaviour { events, gap_ns, .. } = self.behaviour;
                let Some(connection) = self.connections[slot].as_mut() else { return };
                connection.stream = Some(Stream { sent: 0, total: events, gap_ns, start_ns: at_ns, usage });
                self.send_canned(slot, |canned| &mut canned.stream_start);
                self.schedule(slot);
            }
            Wake::NextEvent => {
                self.send_event(slot);
                self.schedule(slot);
            }
        }
    }

    /// Sees to it that the stream's next event is sent in time.
    fn schedule(&mut self, slot: usize) {
        let Some(connection) = self.connections[slot].as_ref() else { return };
        let Some(stream) = &connection.stream else { return };
        if stream.gap_ns > 0 {
            let at_ns = stream.start_ns + u64::from(stream.sent + 1) * stream.gap_ns;
            let serial = connection.serial;
            self.timers.push(Reverse(Timer { at_ns, slot, serial, wake: Wake::NextEvent }));
        } else if connection.unsent.is_empty() {
            self.hot.push(slot);
        }
    }

    /// The next event of a stream, or its end.
    fn send_event(&mut self, slot: usize) {
        let Some(connection) = self.connections[slot].as_mut() else { return };
        let Some(stream) = connection.stream.as_mut() else { return };
        if stream.sent < stream.total {
            stream.sent += 1;
            let at = self.canned.event_stamp;
            write_hex(&mut self.canned.event[at..at + STAMP_DIGITS], poll::now_ns());
            self.send_canned(slot, |canned| &mut canned.event);
        } else if stream.usage {
            connection.stream = None;
            self.send_canned(slot, |canned| &mut canned.end_with_usage);
        } else {
            connection.stream = None;
            self.send_canned(slot, |canned| &mut canned.end_without_usage);
        }
    }

    fn send_canned(&mut self, slot: usize, which: impl Fn(&mut Canned) -> &mut Vec<u8>) {
        let bytes = std::mem::take(which(&mut self.canned));
        self.send(slot, &bytes);
        *which(&mut self.canned) = bytes;
    }

    /// Sends what the socket takes now and keeps the rest.
    fn send(&mut self, slot: usize, mut bytes: &[u8]) {
        let Some(connection) = self.connections[slot].as_mut() else { return };
        while connection.unsent.is_empty() && !bytes.is_empty() {
            match poll::write(&connection.socket, bytes) {
                Ok(Some(count)) => bytes = &bytes[count..],
                Ok(None) => {
                    connection.unsent.extend_from_slice(bytes);
                    if self.poll.wants_write(&connection.socket, slot, true).is_err() {
                        self.close(slot);
                    }
                    return;
                }
                Err(_) => return self.close(slot),
            }
        }
        connection.unsent.extend_from_slice(bytes);
    }

    /// The socket has room again.
    fn flush(&mut self, slot: usize) {
        let Some(connection) = self.connections[slot].as_mut() else { return };
        let unsent = std::mem::take(&mut connection.unsent);
        if self.poll.wants_write(&connection.socket, slot, false).is_err() {
            return self.close(slot);
        }
        self.send(slot, &unsent);
        let Some(connection) = self.connections[slot].as_ref() else { return };
        let is_hot = connection.stream.as_ref().is_some_and(|stream| stream.gap_ns == 0);
        if is_hot && connection.unsent.is_empty() {
            self.hot.push(slot);
        }
    }
}

impl Behaviour {
    fn with(mut self, query: &str) -> Self {
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let Ok(number) = value.parse::<u32>() else { continue };
            match key {
                "delay_us" => self.delay_ns = u64::from(number) * 1000,
                "events" => self.events = number,
                "gap_us" => self.gap_ns = u64::from(number) * 1000,
                _ => {}
            }
        }
        self
    }
}

/// Whether `key` is followed by `true`, wherever it stands.
fn is_true(body: &[u8], key: &str) -> bool {
    Finder::new(key).find_iter(body).any(|at| {
        let after = body[at + key.len()..].trim_ascii_start();
        after.strip_prefix(b":").is_some_and(|value| value.trim_ascii_start().starts_with(b"true"))
    })
}

fn write_hex(place: &mut [u8], number: u64) {
    for (byte, shift) in place.iter_mut().rev().zip((0..u64::BITS).step_by(4)) {
        *byte = b"0123456789abcdef"[usize::from((number >> shift).to_le_bytes()[0] & 15)];
    }
}
