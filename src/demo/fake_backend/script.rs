//! How the fake misbehaves, on command: one [`Fault`] is one way to go wrong.

use std::time::Duration;

/// One way to go wrong. Events are counted as they are sent: the first delta of a stream is event 1. An answer
/// that is not a stream counts as two events, its two halves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Refuses with this status and an error in the server's own shape.
    Status(u16),
    /// 429 with `retry-after` and exhausted `x-ratelimit-*` headers.
    RateLimited { retry_after: Duration },
    /// Resets the connection (RST) before any response byte.
    ResetBeforeHeaders,
    /// Resets the connection after so many events.
    ResetAfter(usize),
    /// Closes the connection (FIN) after so many events, without the end of the body: a killed process.
    CloseAfter(usize),
    /// Ends the body properly after so many events, without a last chunk or `[DONE]`.
    TruncateAfter(usize),
    /// After so many events sends nothing more and keeps the connection open.
    StallAfter(usize),
    /// After so many events sends `data: {"error":..}` and a normal `[DONE]`: vLLM's dead engine.
    ErrorEventAfter(usize),
    /// Waits before response headers, on top of the settings' own latency.
    SlowHeaders(Duration),
    /// Sends every byte of the body in a chunk of its own.
    SingleBytes,
    /// Puts comment lines (`:` and `: keep-alive`) between events.
    Comments,
    /// Ends lines with `\r\n`.
    CarriageReturns,
    /// Answers compressed, whatever the client accepts.
    Gzip,
    /// Reports no usage at all.
    NoUsage,
    /// Puts the usage into a chunk in mid-stream and not at the end.
    UsageInMidStream,
    /// Puts the usage into the last chunk that has choices, and sends no extra chunk.
    UsageWithChoices,
    /// Refuses a body that has `stream_options` with 400, as servers older than it do.
    RejectStreamOptions,
}

/// Random faults: the same seed gives the same sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Chaos {
    pub seed: u64,
    /// Share of requests that go wrong, 0 to 1.
    pub probability: f64,
    /// What goes wrong; one of them is drawn each time.
    pub faults: Vec<Fault>,
}

/// What becomes of the connection at the chosen event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    Reset,
    Close,
    Truncate,
    Stall,
    ErrorEvent,
}

/// Where usage is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum UsageStyle {
    #[default]
    AsAsked,
    Never,
    MidStream,
    WithChoices,
}

/// The faults of one request, folded.
#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent faults of one answer")]
pub(super) struct Behaviour {
    pub(super) refuse: Option<Refusal>,
    pub(super) header_delay: Duration,
    pub(super) reset_before_headers: bool,
    pub(super) cut: Option<(usize, Cut)>,
    pub(super) usage: UsageStyle,
    pub(super) single_bytes: bool,
    pub(super) comments: bool,
    pub(super) carriage_returns: bool,
    pub(super) gzip: bool,
    pub(super) reject_stream_options: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) retry_after: Option<Duration>,
}

impl Behaviour {
    pub(super) fn of<'a>(faults: impl IntoIterator<Item = &'a Fault>) -> Self {
        let mut behaviour = Self::default();
        for fault in faults {
            behaviour.add(fault);
        }
        behaviour
    }

    fn add(&mut self, fault: &Fault) {
        match *fault {
            Fault::Status(status) => self.refuse = Some(Refusal { status, retry_after: None }),
            Fault::RateLimited { retry_after } => {
                self.refuse = Some(Refusal { status: 429, retry_after: Some(retry_after) });
            }
            Fault::ResetBeforeHeaders => self.reset_before_headers = true,
            Fault::ResetAfter(events) => self.cut = Some((events, Cut::Reset)),
            Fault::CloseAfter(events) => self.cut = Some((events, Cut::Close)),
            Fault::TruncateAfter(events) => self.cut = Some((events, Cut::Truncate)),
            Fault::StallAfter(events) => self.cut = Some((events, Cut::Stall)),
            Fault::ErrorEventAfter(events) => self.cut = Some((events, Cut::ErrorEvent)),
            Fault::SlowHeaders(delay) => self.header_delay += delay,
            Fault::SingleBytes => self.single_bytes = true,
            Fault::Comments => self.comments = true,
            Fault::CarriageReturns => self.carriage_returns = true,
            Fault::Gzip => self.gzip = true,
            Fault::NoUsage => self.usage = UsageStyle::Never,
            Fault::UsageInMidStream => self.usage = UsageStyle::MidStream,
            Fault::UsageWithChoices => self.usage = UsageStyle::WithChoices,
            Fault::RejectStreamOptions => self.reject_stream_options = true,
        }
    }
}

/// The draw for one request.
pub(super) fn draw<'a>(chaos: &'a Chaos, random: &mut fastrand::Rng) -> Option<&'a Fault> {
    let happens = random.f64() < chaos.probability;
    let index = random.usize(..chaos.faults.len().max(1));
    chaos.faults.get(index).filter(|_| happens)
}
