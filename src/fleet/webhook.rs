//! Control by a signed POST request.
//!
//! The signature is `x-breakeven-signature: t=<seconds since the epoch>,v1=<hex>`, where the hex is
//! HMAC-SHA256 of `<t>.<body>` under the shared secret. `idempotency-key` is the same for every try of one
//! order, so that a receiver can ignore repetitions.

use std::fmt::Write as _;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use reqwest::StatusCode;
use serde::Serialize;
use sha2::Sha256;

use super::reins::Reins;
use crate::clock::Clock;
use crate::config::Secret;
use crate::economics::Timestamp;
use crate::health::probe::root_cause;

pub const SIGNATURE_HEADER: &str = "x-breakeven-signature";
/// Tries of one order, the first included.
pub const ATTEMPTS: u32 = 5;
/// Pause before the second try; doubles.
pub const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Bound on one try, in real time.
pub const TRY_TIMEOUT: Duration = Duration::from_secs(10);

/// What the receiver is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Order {
    pub backend: String,
    pub action: Verb,
    /// 0-based.
    pub replica: u32,
    pub base_url: String,
    /// How many replicas are wanted in all.
    pub target: u32,
    /// Of the planner's lease, where several proxies share one. The next holder's is higher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    Start,
    Stop,
}

/// The value of the signature header for a body sent at `at`.
///
/// ```
/// use breakeven::{config::Secret, economics::Timestamp, fleet::webhook::signature};
/// let header = signature(&Secret::new("s3cret".into()), Timestamp::from_secs(1_700_000_000), b"{}");
/// assert!(header.starts_with("t=1700000000,v1="));
/// ```
pub fn signature(secret: &Secret, at: Timestamp, body: &[u8]) -> String {
    let seconds = at.as_millis() / 1000;
    let mut mac =
        Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes()).expect("HMAC takes a key of any length");
    mac.update(seconds.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    let mut header = format!("t={seconds},v1=");
    for byte in mac.finalize().into_bytes() {
        write!(header, "{byte:02x}").expect("a string can be written to");
    }
    header
}

/// Sends the order until it is accepted (2xx). Refusals (other 4xx than 408, 425 and 429) are final; everything
/// else is tried [`ATTEMPTS`] times. None when it was called back between two tries: an order to start must
/// not arrive after the order to stop.
pub(super) async fn send(
    client: &reqwest::Client,
    url: &str,
    secret: Option<&Secret>,
    order: &Order,
    key: &str,
    clock: &Clock,
    reins: Option<&mut Reins>,
) -> Option<Result<(), String>> {
    let mut asked_to_stop = std::pin::pin!(async {
        match reins {
            Some(reins) => reins.asked_to_stop().await,
            None => std::future::pending().await,
        }
    });
    let body = serde_json::to_vec(order).expect("an order is plain data");
    let mut pause = FIRST_RETRY;
    let mut attempt = 1;
    loop {
        let (reason, is_final) = match post(client, url, secret, &body, key, clock.now()).await {
            Ok(status) if status.is_success() => return Some(Ok(())),
            Ok(status) => (format!("the webhook answered {}", status.as_u16()), is_refusal(status)),
            Err(error) if error.is_timeout() => ("the webhook did not answer in time".to_owned(), false),
            Err(error) => (format!("the webhook cannot be reached: {}", root_cause(&error)), false),
        };
        if is_final || attempt == ATTEMPTS {
            return Some(Err(reason));
        }
        tokio::select! {
            () = tokio::time::sleep(clock.real(pause)) => {}
            () = &mut asked_to_stop => return None,
        }
        pause *= 2;
        attempt += 1;
    }
}

async fn post(
    client: &reqwest::Client,
    url: &str,
    secret: Option<&Secret>,
    body: &[u8],
    key: &str,
    now: Timestamp,
) -> Result<StatusCode, reqwest::Error> {
    let mut request = client
        .post(url)
        .timeout(TRY_TIMEOUT)
        .header("content-type", "application/json")
        .header("idempotency-key", key)
        .body(body.to_vec());
    if let Some(secret) = secret {
        request = request.header(SIGNATURE_HEADER, signature(secret, now, body));
    }
    Ok(request.send().await?.status())
}

fn is_refusal(status: StatusCode) -> bool {
    status.is_client_error() && !matches!(status.as_u16(), 408 | 425 | 429)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `hmac.new(b"whsec_test", b"1764000000." + body, hashlib.sha256).hexdigest()` in Python.
    #[test]
    fn the_signature_is_what_another_implementation_computes() {
        let order = Order {
            backend: "gpu".to_owned(),
            action: Verb::Start,
            replica: 1,
            base_url: "http://127.0.0.1:8001/v1".to_owned(),
            target: 2,
            token: None,
        };
        let body = serde_json::to_vec(&order).unwrap();
        assert_eq!(
            std::str::from_utf8(&body).unwrap(),
            r#"{"backend":"gpu","action":"start","replica":1,"base_url":"http://127.0.0.1:8001/v1","target":2}"#
        );
        assert_eq!(
            signature(&Secret::new("whsec_test".to_owned()), Timestamp::from_secs(1_764_000_000), &body),
            "t=1764000000,v1=ee1633bf9f17f2cc1ae7d456ee8ec5c07ff854f235c6e82fe5a50855454ad84d"
        );
    }

    #[test]
    fn the_token_of_a_lease_is_in_the_body_that_is_signed() {
        let order = Order {
            backend: "gpu".to_owned(),
            action: Verb::Stop,
            replica: 0,
            base_url: "http://127.0.0.1:8001/v1".to_owned(),
            target: 0,
            token: Some(17),
        };
        assert!(serde_json::to_string(&order).unwrap().ends_with(r#""target":0,"token":17}"#));
    }

    #[test]
    fn a_refusal_is_final_and_a_request_to_come_back_is_not() {
        let refused = |status| is_refusal(StatusCode::from_u16(status).unwrap());
        assert!(refused(401) && refused(404) && refused(422));
        assert!(!refused(429) && !refused(408) && !refused(500) && !refused(503));
    }
}
