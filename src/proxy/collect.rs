//! Request bodies that are read: each within its limits, and all of them within one bound.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::error::ProxyError;
use crate::clock::within;
use crate::config::Limits;
use crate::gateway::buffers::{Full, Room};

/// Collects a request body within the limits. One that arrived in one piece is not copied. `room` covers its bytes as
/// they arrive, so that an announced length takes nothing from others.
pub(crate) async fn collect(
    mut incoming: Incoming,
    limits: &Limits,
    room: &mut Room<'_>,
) -> Result<Bytes, ProxyError> {
    let limit = limits.max_body_bytes;
    if incoming.size_hint().lower() > limit as u64 {
        return Err(ProxyError::BodyTooLarge { limit });
    }
    if incoming.is_end_stream() {
        return Ok(Bytes::new());
    }
    let collecting = pin!(collect_up_to(&mut incoming, limit, room));
    match within(limits.body_timeout, collecting).await {
        Err(_) => Err(ProxyError::BodyTimeout),
        Ok(collected) => collected,
    }
}

/// Memory that a body is given for its announced length, before its bytes have come.
const MAX_TRUSTED_LENGTH: usize = 1 << 20;

/// Pieces are copied together as they come, while the processor's caches still have them and so that the
/// connection can receive into the same buffer again.
async fn collect_up_to(
    incoming: &mut Incoming,
    limit: usize,
    room: &mut Room<'_>,
) -> Result<Bytes, ProxyError> {
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(frame) = incoming.frame().await {
        let Ok(piece) = frame.map_err(|_| ProxyError::BodyBroken)?.into_data() else { continue };
        let length = first.len().max(all.len()) + piece.len();
        if length > limit {
            return Err(ProxyError::BodyTooLarge { limit });
        }
        if let Err(full) = room.cover(length) {
            drop((first, all));
            pass_over(incoming, limit.saturating_sub(length)).await;
            return Err(full.into());
        }
        if !all.is_empty() {
            all.extend_from_slice(&piece);
        } else if first.is_empty() {
            first = piece;
        } else {
            let left = usize::try_from(incoming.size_hint().lower()).unwrap_or(usize::MAX);
            all.reserve(first.len() + piece.len() + left.min(MAX_TRUSTED_LENGTH));
            all.extend_from_slice(&std::mem::take(&mut first));
            all.extend_from_slice(&piece);
        }
        if incoming.is_end_stream() {
            break;
        }
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// Reads what is left of a body, so that its client sees an answer and not a broken connection.
async fn pass_over(incoming: &mut Incoming, most: usize) {
    let mut left = most;
    while let Some(Ok(frame)) = incoming.frame().await {
        let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { return };
        left = rest;
    }
}

impl From<Full> for ProxyError {
    fn from(full: Full) -> Self {
        Self::BuffersFull { limit: full.limit }
    }
}
