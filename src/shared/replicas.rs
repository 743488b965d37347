//! Replicas that all proxies send calls to: how many are in flight there, and which are about to stop.
//!
//! Whoever orders replicas says which are to stop; the others send them nothing more, and say when their calls
//! have ended.

use redis::from_redis_value;

use super::{Answers, Exchange, SharedError, Store, number};

/// What a proxy, or all others together, say of one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplicaNews {
    pub in_flight: u32,
    /// It is to stop, or stopping.
    pub is_leaving: bool,
}

const NOBODY_SAYS: &str = "-";

impl Exchange {
    pub fn tell_replicas(&mut self, store: &Store, pool: &str, replicas: &[ReplicaNews], orders: bool) {
        let list = |each: &dyn Fn(&ReplicaNews) -> u32| {
            let words: Vec<String> = replicas.iter().map(|replica| each(replica).to_string()).collect();
            words.join(",")
        };
        let leaving = list(&|replica| u32::from(replica.is_leaving));
        self.pipeline
            .cmd("EVALSHA")
            .arg(&store.scripts.replicas)
            .arg(1)
            .arg(store.keys.named(&format!("replicas:{pool}")))
            .arg(&store.identity.process)
            .arg(store.lease_millis())
            .arg(list(&|replica| replica.in_flight))
            .arg(if orders { &leaving } else { NOBODY_SAYS });
        self.questions += 1;
    }
}

impl Answers {
    /// What the others say, replica by replica, as far as any of them says something.
    pub fn replicas(&mut self) -> Result<Vec<ReplicaNews>, SharedError> {
        let words: Vec<String> = from_redis_value(self.next()?)?;
        let [leaving, in_flight @ ..] = words.as_slice() else {
            return Err(SharedError::Strange("the answer about replicas is empty".to_owned()));
        };
        let mut leaving = leaving.split(',').map(|flag| flag == "1");
        let news = |in_flight: &String| {
            Ok(ReplicaNews { in_flight: number(in_flight)?, is_leaving: leaving.next().unwrap_or(false) })
        };
        in_flight.iter().map(news).collect()
    }
}
