//! Reference experts.
use std::time::Duration;

use super::layers::slots_in;
use super::lcp::LazyLayer;
use super::policy::{Decision, Fleet, Policy, Preference, Reason, Slot};
use super::{PoolSpec, Timestamp};

#[derive(Debug, Clone)]
struct Ex {
    on: bool,
    age: u32,
    loss: f64,
}
#[derive(Debug, Clone)]
struct L {
    lcp: Vec<LazyLayer>,
    ex: Vec<Ex>,
    ew: [f64; 3],
    pick: usize,
}

#[derive(Debug)]
pub struct Adaptive {
    slot: Duration,
    layers: Vec<L>,
}
impl Adaptive {
    pub fn new(slot: Duration) -> Self {
        Self { slot, layers: vec![] }
    }
}
const A: [f64; 6] = [0.02, 0.1, 0.3, 1.0, 2.0, f64::INFINITY];
const B: [f64; 7] = [0.05, 0.3, 1.0, 2.0, 4.0, 12.0, f64::INFINITY];
impl Policy for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }
    fn decide(&mut self, pool: &PoolSpec, _: Timestamp, finished: &Slot, _: Fleet) -> Decision {
        let d = slots_in(pool.startup, self.slot);
        let beta = f64::from(d);
        let dt = self.slot.as_secs_f64();
        if self.layers.is_empty() {
            self.layers = vec![
                L {
                    lcp: vec![LazyLayer::default(); 42],
                    ex: vec![Ex { on: false, age: 0, loss: 0.0 }; 51],
                    ew: [0.0; 3],
                    pick: 3 * 7 + 2
                };
                pool.max_replicas as usize
            ];
        }
        let decay = 2f64.powf(-dt / 86400.0);
        let mut n = 0;
        for (l, g) in self.layers.iter_mut().zip(finished.gains_in_rents(pool, self.slot)) {
            for e in &mut l.ex {
                let served = e.on && e.age >= d;
                e.loss = e.loss * decay + if e.on { 1.0 } else { 0.0 } + if served { 0.0 } else { g };
                if e.on {
                    e.age += 1;
                }
            }
            for (i, x) in l.lcp.iter_mut().enumerate() {
                x.learn(g, A[i / 7] * beta, B[i % 7] * beta);
                let e = &mut l.ex[i];
                if x.is_on() != e.on {
                    e.on = x.is_on();
                    e.age = 0;
                }
            }
            for (k, hl) in [300.0, 900.0, 3600.0].into_iter().enumerate() {
                let w = 2f64.powf(-dt / hl);
                l.ew[k] = l.ew[k] * w + g * (1.0 - w);
                for (m, (u, v)) in [(1.0, 0.8), (1.25, 0.6), (1.0, 0.5)].into_iter().enumerate() {
                    let e = &mut l.ex[42 + k * 3 + m];
                    let on = if e.on { l.ew[k] >= v } else { l.ew[k] > u };
                    if on != e.on {
                        e.on = on;
                        e.age = 0;
                    }
                }
            }
            let best = (0..51)
                .min_by(|a, b| l.ex[*a].loss.total_cmp(&l.ex[*b].loss))
                .expect("a range of 51 has a least");
            if l.ex[best].loss + beta < l.ex[l.pick].loss {
                l.pick = best;
            }
            if l.ex[l.pick].on {
                n += 1;
            }
        }
        Decision {
            target_replicas: n,
            preference: if n > 0 { Preference::SelfHosted } else { Preference::Api },
            reason: Reason::Cheapest,
        }
    }
}
