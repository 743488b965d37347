//! Many connections, each with at most one call under way.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};

use memchr::memmem::Finder;

use super::Arguments;
use crate::http::{Event, Lines, Reader};
use crate::mock::STAMP;
use crate::poll::{self, Poll, Ready};
use crate::prose::{ChatBody, write_serial};
use crate::samples::Samples;

/// Different bodies that requests take turns with; fewer of the large ones.
const BODIES: u64 = 64;
const LARGE_BODIES: u64 = 8;
const LARGE: usize = 64 * 1024;
/// How much of a failure's text is kept.
const FAILURE_BYTES: usize = 300;

#[derive(Default)]
pub(super) struct Totals {
    pub complete: u64,
    pub failures: u64,
    pub first_failure: Option<String>,
    pub events: u64,
    pub latency: Samples,
    pub first_event: Samples,
    pub transit: Samples,
    pub gap: Samples,
}

impl Totals {
    /// Starts anew, with the memory of the samples. Failures of the warm-up are remembered.
    pub fn clear(&mut self) {
        (self.complete, self.events) = (0, 0);
        for samples in [&mut self.latency, &mut self.first_event, &mut self.transit, &mut self.gap] {
            samples.clear();
        }
    }

    fn fail(&mut self, why: impl FnOnce() -> String) {
        self.failures += 1;
        self.first_failure.get_or_insert_with(why);
    }
}

struct Request {
    bytes: Vec<u8>,
    /// Where the newest message's serial number is.
    serial: usize,
}

struct Connection {
    socket: TcpStream,
    reader: Reader,
    unsent: Vec<u8>,
    is_busy: bool,
    answer: Answer,
}

/// The call under way.
#[derive(Default)]
struct Answer {
    due_ns: u64,
    status: u16,
    close: bool,
    lines: Lines,
    events: u32,
    last_event_ns: u64,
    is_done: bool,
    is_complete: bool,
    error: Vec<u8>,
}

pub(super) struct Client {
    poll: Poll,
    target: SocketAddr,
    stream: bool,
    events: u32,
    connections: usize,
    max_connections: usize,
    ramp_ns: u64,
    interval_ns: Option<u64>,
    next_due_ns: Option<u64>,
    requests: Vec<Request>,
    open: Vec<Connection>,
    idle: Vec<usize>,
    backlog: VecDeque<u64>,
    under_way: usize,
    is_finishing: bool,
    serial: u64,
    stamp: Finder<'static>,
    scratch: Vec<u8>,
    pub totals: Totals,
}

impl Client {
    pub fn new(arguments: &Arguments) -> io::Result<Self> {
        let bodies = if arguments.body > LARGE { LARGE_BODIES } else { BODIES };
        Ok(Self {
            poll: Poll::new()?,
            target: arguments.target,
            stream: arguments.stream,
            events: arguments.events,
            connections: arguments.connections,
            max_connections: arguments.max_connections,
            ramp_ns: arguments.ramp_ms * 1_000_000,
            interval_ns: arguments.rate.map(|rate| 1_000_000_000 / rate),
            next_due_ns: None,
            requests: (0..bodies).map(|seed| request(arguments, seed)).collect(),
            open: Vec::new(),
            idle: Vec::new(),
            backlog: VecDeque::new(),
            under_way: 0,
            is_finishing: false,
            serial: 0,
            stamp: Finder::new(STAMP),
            scratch: vec![0; 256 * 1024],
            totals: Totals::default(),
        })
    }

    /// Keeps the load up until `end_ns`. `start_ns` is when the run as a whole began.
    pub fn run_until(&mut self, start_ns: u64, end_ns: u64) -> anyhow::Result<()> {
        loop {
            let now = poll::now_ns();
            if now >= end_ns {
                return Ok(());
            }
            let next = match self.interval_ns {
                Some(interval) => self.start_due(now, interval)?,
                None => self.open_due(start_ns, now)?,
            };
            self.turn(next.min(end_ns).saturating_sub(poll::now_ns()))?;
        }
    }

    /// Starts nothing more and waits for the calls under way: one cut off would make the proxy count its tokens.
    pub fn finish(&mut self, deadline_ns: u64) -> anyhow::Result<()> {
        self.is_finishing = true;
        while self.under_way > 0 {
            let left = deadline_ns.saturating_sub(poll::now_ns());
            anyhow::ensure!(left > 0, "{} calls were never answered", self.under_way);
            self.turn(left)?;
        }
        Ok(())
    }

    /// Opens the connections of a closed loop that are due by now, spread over the ramp; when the next one is due.
    fn open_due(&mut self, start_ns: u64, now: u64) -> anyhow::Result<u64> {
        while self.open.len() < self.connections {
            let due = start_ns + self.ramp_ns * self.open.len() as u64 / self.connections as u64;
            if due > now {
                return Ok(due);
            }
            let slot = self.connect()?;
            self.start(slot, now);
        }
        Ok(u64::MAX)
    }

    /// Starts the requests of an open loop that are due by now; when the next one is due.
    fn start_due(&mut self, now: u64, interval: u64) -> anyhow::Result<u64> {
        let mut next = self.next_due_ns.unwrap_or(now);
        while next <= now {
            self.backlog.push_back(next);
            next += interval;
        }
        self.next_due_ns = Some(next);
        while let Some(due) = self.backlog.front().copied() {
            let slot = match self.idle.pop() {
                Some(slot) => slot,
                None if self.open.len() < self.max_connections => self.connect()?,
                None => break,
            };
            self.backlog.pop_front();
            self.start(slot, due);
        }
        Ok(next)
    }

    fn turn(&mut self, timeout_ns: u64) -> anyhow::Result<()> {
        let mut ready: Vec<Ready> = Vec::new();
        self.poll.wait(Some(timeout_ns), &mut ready)?;
        for event in ready {
            if event.to_write {
                self.flush(event.token)?;
            }
            if event.to_read {
                self.receive(event.token)?;
            }
        }
        Ok(())
    }

    fn connect(&mut self) -> io::Result<usize> {
        let slot = self.open.len();
        let socket = poll::connect(self.target)?;
        self.poll.add(&socket, slot)?;
        self.open.push(Connection {
            socket,
            reader: Reader::default(),
            unsent: Vec::new(),
            is_busy: false,
            answer: Answer::default(),
        });
        Ok(slot)
    }

    fn reconnect(&mut self, slot: usize) -> io::Result<()> {
        let connection = &mut self.open[slot];
        connection.socket = poll::connect(self.target)?;
        connection.reader = Reader::default();
        connection.unsent.clear();
        self.poll.add(&connection.socket, slot)
    }

    fn start(&mut self, slot: usize, due_ns: u64) {
        self.serial += 1;
        self.under_way += 1;
        let turn = usize::try_from(self.serial % self.requests.len() as u64).expect("below a length");
        let request = &mut self.requests[turn];
        write_serial(&mut request.bytes[request.serial..], self.serial);
        let connection = &mut self.open[slot];
        connection.is_busy = true;
        connection.answer.begin(due_ns);
        let mut unsent = request.bytes.as_slice();
        // A lost connection shows when the answer is read.
        while let Ok(Some(count)) = poll::write(&connection.socket, unsent) {
            unsent = &unsent[count..];
            if unsent.is_empty() {
                return;
            }
        }
        connection.unsent.extend_from_slice(unsent);
        let _ = self.poll.wants_write(&connection.socket, slot, true);
    }

    fn flush(&mut self, slot: usize) -> io::Result<()> {
        let connection = &mut self.open[slot];
        let mut sent = 0;
        while sent < connection.unsent.len() {
            match poll::write(&connection.socket, &connection.unsent[sent..]) {
                Ok(Some(count)) => sent += count,
                Ok(None) | Err(_) => break,
            }
        }
        connection.unsent.drain(..sent);
        let more = !connection.unsent.is_empty();
        self.poll.wants_write(&connection.socket, slot, more)
    }

    fn receive(&mut self, slot: usize) -> anyhow::Result<()> {
        loop {
            let connection = &mut self.open[slot];
            let received = poll::read(&connection.socket, &mut self.scratch);
            let now = poll::now_ns();
            let count = match received {
                Ok(None) => return Ok(()),
                Ok(Some(count)) if count > 0 => count,
                _ => return self.lost(slot, now),
            };
            let Connection { reader, answer, .. } = connection;
            let (totals, stamp, stream) = (&mut self.totals, &self.stamp, self.stream);
            let fed =
                reader.feed(&self.scratch[..count], |event| answer.take(&event, now, stream, stamp, totals));
            fed.map_err(anyhow::Error::msg)?;
            if connection.answer.is_complete {
                return self.finished(slot, now);
            }
            if count < self.scratch.len() {
                return Ok(());
            }
        }
    }

    fn finished(&mut self, slot: usize, now: u64) -> anyhow::Result<()> {
        let answer = &self.open[slot].answer;
        if answer.status != 200 {
            let text = String::from_utf8_lossy(&answer.error).into_owned();
            let status = answer.status;
            self.totals.fail(|| format!("{status}: {text}"));
        } else if self.stream && (answer.events != self.events || !answer.is_done) {
            let (events, done) = (answer.events, answer.is_done);
            self.totals.fail(|| format!("a stream of {events} events, [DONE] seen: {done}"));
        } else {
            self.totals.complete += 1;
            self.totals.latency.push(now.saturating_sub(answer.due_ns));
        }
        if answer.close {
            self.reconnect(slot)?;
        }
        self.rest(slot);
        Ok(())
    }

    /// The other side closed.
    fn lost(&mut self, slot: usize, now: u64) -> anyhow::Result<()> {
        let was_busy = self.open[slot].is_busy;
        self.reconnect(slot)?;
        if was_busy {
            self.totals.fail(|| "the connection was closed before the answer ended".to_owned());
            self.open[slot].answer.due_ns = now;
            self.rest(slot);
        }
        Ok(())
    }

    /// The connection is free: a closed loop uses it at once.
    fn rest(&mut self, slot: usize) {
        self.under_way -= 1;
        self.open[slot].is_busy = false;
        if self.interval_ns.is_none() && !self.is_finishing {
            self.start(slot, poll::now_ns());
        } else {
            self.idle.push(slot);
        }
    }
}

impl Answer {
    fn begin(&mut self, due_ns: u64) {
        self.lines.clear();
        self.error.clear();
        let (lines, error) = (std::mem::take(&mut self.lines), std::mem::take(&mut self.error));
        *self = Self { due_ns, lines, error, ..Self::default() };
    }

    fn take(&mut self, event: &Event<'_>, now: u64, stream: bool, stamp: &Finder<'_>, totals: &mut Totals) {
        match event {
            Event::Head(head) => (self.status, self.close) = (head.status, head.close),
            Event::Data(data) if self.status != 200 => {
                let room = FAILURE_BYTES.saturating_sub(self.error.len());
                self.error.extend_from_slice(&data[..data.len().min(room)]);
            }
            Event::Data(data) if stream => {
                let mut lines = std::mem::take(&mut self.lines);
                lines.feed(data, |line| self.take_line(line, now, stamp, totals));
                self.lines = lines;
            }
            Event::Data(_) => {}
            Event::End => self.is_complete = true,
        }
    }

    fn take_line(&mut self, line: &[u8], now: u64, stamp: &Finder<'_>, totals: &mut Totals) {
        if line.starts_with(b"data: [DONE]") {
            self.is_done = true;
            return;
        }
        let Some(at) = stamp.find(line) else { return };
        let digits = line.get(at + 2..at + 18).and_then(|hex| std::str::from_utf8(hex).ok());
        let written_ns = digits.and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(now);
        totals.events += 1;
        totals.transit.push(now.saturating_sub(written_ns));
        if self.events == 0 {
            totals.first_event.push(now.saturating_sub(self.due_ns));
        } else {
            totals.gap.push(now - self.last_event_ns);
        }
        self.last_event_ns = now;
        self.events += 1;
    }
}

fn request(arguments: &Arguments, seed: u64) -> Request {
    let body = ChatBody::new(&arguments.model, arguments.body, arguments.stream, seed + 1);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nUser-Agent: OpenAI/Python 1.99.0\r\n\
         Authorization: Bearer {}\r\nContent-Length: {}\r\n\r\n",
        arguments.target,
        arguments.key,
        body.bytes.len()
    );
    let newest = body.serials.last().copied().unwrap_or_default();
    Request { serial: head.len() + newest, bytes: [head.as_bytes(), &body.bytes].concat() }
}
