//! Whatever bytes the files of a cache have: reading them gives tokens below the vocabulary's size or an error, and
//! never a panic or a read outside of the file.
//!
//! An input is a length (u16, little-endian), the bytes of a manifest of that length, and those of the first shard.
//! Half of the inputs, by the last bit of their sum, get right checksums, so that what is behind these is reached.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};
use vesper_data::{BatchSampler, PackedSampler, SamplerConfig, TokenCache};

const HEADER: usize = 256;

fuzz_target!(|input: &[u8]| {
    let Some((length, rest)) = input.split_first_chunk::<2>() else { return };
    let at = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (mut manifest, mut shard) = (rest[..at].to_vec(), rest[at..].to_vec());
    if input.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) & 1 == 0 {
        seal(&mut manifest, &mut shard);
    }
    let folder = tempfile::tempdir_in(memory()).expect("a folder");
    std::fs::write(folder.path().join("manifest.bin"), &manifest).expect("a file");
    std::fs::write(folder.path().join(shard_name(&manifest)), &shard).expect("a file");
    read(folder.path());
});

/// A file system in memory where there is one: an input takes files.
fn memory() -> &'static Path {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm } else { Path::new("/tmp") }
}

/// The digests of the header, the ids, the index and the tables.
fn seal(manifest: &mut [u8], shard: &mut [u8]) {
    if shard.len() >= HEADER {
        let number = |at: usize| u64::from_le_bytes(shard[at..at + 8].try_into().expect("eight bytes"));
        let width = u64::from(shard[16]);
        let ids = number(48).saturating_mul(width).checked_next_multiple_of(8).unwrap_or(u64::MAX);
        let middle = (ids.saturating_add(HEADER as u64)).min(shard.len() as u64) as usize;
        for (at, digest) in [(112, Sha256::digest(&shard[HEADER..middle])), (144, Sha256::digest(&shard[middle..]))] {
            shard[at..at + 32].copy_from_slice(&digest);
        }
        let digest = Sha256::digest(&shard[..224]);
        shard[224..256].copy_from_slice(&digest);
    }
    if manifest.len() >= HEADER + 32 {
        if manifest.len() >= HEADER + 64 + 32 && shard.len() >= HEADER {
            let digest = Sha256::digest(&shard[..HEADER]);
            manifest[HEADER + 32..HEADER + 64].copy_from_slice(&digest);
        }
        let digest = Sha256::digest(&manifest[..224]);
        manifest[224..256].copy_from_slice(&digest);
        let end = manifest.len() - 32;
        let digest = Sha256::digest(&manifest[..end]);
        manifest[end..].copy_from_slice(&digest);
    }
}

/// The name that the manifest asks for.
fn shard_name(manifest: &[u8]) -> String {
    let part = |from: usize, to: usize| manifest.get(from..to).unwrap_or_default();
    let mut build = Sha256::new_with_prefix(b"vesper token cache 3");
    for bytes in [part(88, 120), part(120, 152), part(48, 56), part(80, 88)] {
        build.update(bytes);
    }
    let hex: String = build.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}-00000.shard")
}

fn read(folder: &Path) {
    let Ok(cache) = TokenCache::open(folder) else { return };
    let verified = cache.verify().is_ok();
    let tokens = cache.tokens();
    let ids = tokens.to_vec();
    if verified {
        let ids = ids.as_ref().expect("a cache that was verified is read");
        assert!(ids.iter().all(|&id| u64::from(id) < cache.key().vocab_size));
    }
    let mut end = 0;
    for document in tokens.documents() {
        let Ok(document) = document else { break };
        assert!(document.start == end && document.end <= tokens.len());
        end = document.end;
    }
    let _ = tokens.for_each_ignored(0..tokens.len(), |range| assert!(range.end <= cache.len()));
    if let Ok((train, eval)) = tokens.split_documents(0.5, 1) {
        assert_eq!(train.len() + eval.len(), tokens.len());
        let _ = (train.to_vec(), eval.split(0.3).map(|(head, _)| head.to_vec()));
    }
    let config = SamplerConfig::default().with_batch(2).with_seq(3);
    if let Ok(mut sampler) = BatchSampler::new(tokens.clone(), config.clone()) {
        let _ = sampler.next_batch(&vesper_data::candle_core::Device::Cpu);
    }
    if let Ok(mut sampler) = PackedSampler::new(tokens, config) {
        let _ = sampler.next_batch(&vesper_data::candle_core::Device::Cpu);
    }
}
