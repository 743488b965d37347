//! The cases.

/// What the upstream does and what clients ask for.
pub struct Case {
    pub name: &'static str,
    pub stream: bool,
    body: usize,
    connections: u32,
    /// Calls a second, in an open loop.
    rate: Option<u32>,
    delay_us: u32,
    events: u32,
    gap_us: u32,
    ramp_ms: u64,
    window_ms: u64,
}

const UNARY: Case = Case {
    name: "",
    stream: false,
    body: 1024,
    connections: 32,
    rate: None,
    delay_us: 0,
    events: 256,
    gap_us: 0,
    ramp_ms: 0,
    window_ms: 2000,
};

const STREAM: Case = Case { stream: true, ..UNARY };

pub const CASES: [Case; 8] = [
    Case { name: "unary-1k", ..UNARY },
    Case { name: "unary-16k", body: 16 * 1024, ..UNARY },
    Case { name: "unary-200k", body: 200 * 1024, ..UNARY },
    // Events as fast as they go.
    Case { name: "burst", connections: 16, ..STREAM },
    // 12,800 separate events a second.
    Case { name: "paced", connections: 64, gap_us: 5000, ramp_ms: 500, ..STREAM },
    // Before many streams: what a proxy gives back to the system behind them, it gives back during the next case.
    Case { name: "open-loop", rate: Some(500), delay_us: 20_000, window_ms: 3000, ..UNARY },
    // 20,000 separate events a second.
    Case {
        name: "streams-1000",
        connections: 1000,
        events: 100,
        gap_us: 50_000,
        ramp_ms: 1500,
        window_ms: 3000,
        ..STREAM
    },
    // As many, from more connections; longer than a stream, so that whole ones are checked.
    Case {
        name: "streams-5000",
        connections: 5000,
        events: 40,
        gap_us: 250_000,
        ramp_ms: 4000,
        window_ms: 12_000,
        ..STREAM
    },
];

impl Case {
    /// The mock's instructions.
    pub fn behaviour(&self) -> String {
        format!("delay_us={}&events={}&gap_us={}", self.delay_us, self.events, self.gap_us)
    }

    /// `scale` is a factor on the measured time, in percent.
    pub fn load_arguments(&self, scale: u64) -> Vec<String> {
        let mut arguments = vec![
            format!("--body={}", self.body),
            format!("--connections={}", self.connections),
            format!("--events={}", self.events),
            format!("--ramp-ms={}", self.ramp_ms),
            format!("--window-ms={}", self.window_ms * scale / 100),
        ];
        if self.stream {
            arguments.push("--stream".to_owned());
        }
        if let Some(rate) = self.rate {
            arguments.push(format!("--rate={rate}"));
        }
        arguments
    }
}
