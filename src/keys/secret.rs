//! The secret of a virtual key, and the digest that stands for it everywhere else.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// Every secret begins with it, so that scanners and people know what they found.
pub const PREFIX: &str = "sk-be-";

const RANDOM_BYTES: usize = 32;
const ID_BYTES: usize = 9;
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// SHA-256 of a secret. A secret has 256 random bits, so there is nothing to guess and no slow hash to need;
/// and what is looked up is this digest, whose bytes say nothing about how near a guess was.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    pub fn of(secret: &[u8]) -> Self {
        Self(Sha256::digest(secret).into())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Digest(..)")
    }
}

/// The system's source of randomness failed.
#[derive(Debug, thiserror::Error)]
#[error("the system gives no random bytes")]
pub struct NoRandomness;

/// A new secret: `sk-be-` and 32 random bytes in base64url.
pub fn generate() -> Result<String, NoRandomness> {
    Ok(format!("{PREFIX}{}", base64url(&random::<RANDOM_BYTES>()?)))
}

/// A new public id: `key_` and nine random bytes in base64url, letters and digits only.
pub fn new_id() -> Result<String, NoRandomness> {
    Ok(format!("key_{}", base64url(&random::<ID_BYTES>()?).replace(['-', '_'], "0")))
}

fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    let source = rustls::crypto::ring::default_provider().secure_random;
    source.fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(bytes)
}

fn base64url(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits =
            group.iter().enumerate().fold(0_u32, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        for digit in 0..=group.len() {
            text.push(char::from(ALPHABET[(bits >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_is_that_of_rfc_4648() {
        for (bytes, text) in [("", ""), ("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64url(bytes.as_bytes()), text);
        }
        assert_eq!(base64url(&[0xfb, 0xff]), "-_8");
    }

    #[test]
    fn two_secrets_differ_and_have_all_their_bits() {
        let (one, other) = (generate().unwrap(), generate().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.len(), PREFIX.len() + 43);
        assert_ne!(Digest::of(one.as_bytes()), Digest::of(other.as_bytes()));
    }
}
