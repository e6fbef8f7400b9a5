//! Which tensors a model has, under which names and in which shapes, in memory and on disk.

use candle_core::{Result, Tensor};

use crate::{Projection, VesperConfig};

/// One tensor in memory and the rows of it that are tensors on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The name in memory.
    pub(crate) name: String,
    /// The shape in memory: the parts' rows together.
    pub(crate) shape: Vec<usize>,
    /// The tensors on disk, in the order of their rows. One part of the same name where nothing is packed.
    pub(crate) parts: Vec<Part>,
}

/// One tensor on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

impl Entry {
    fn single(name: String, shape: Vec<usize>) -> Self {
        Self { parts: vec![Part { name: name.clone(), shape: shape.clone() }], name, shape }
    }

    fn packed(name: String, parts: Vec<Part>, width: usize) -> Self {
        let rows = parts.iter().map(Part::rows).sum();
        Self { name, shape: vec![rows, width], parts }
    }

    /// The parts of the tensor in memory: views of its rows.
    pub(crate) fn unpack(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        let mut start = 0;
        self.parts
            .iter()
            .map(|part| {
                let rows = tensor.narrow(0, start, part.rows());
                start += part.rows();
                rows
            })
            .collect()
    }

    /// The tensor in memory from its parts.
    pub(crate) fn pack(parts: &[Tensor]) -> Result<Tensor> {
        match parts {
            [whole] => Ok(whole.clone()),
            parts => Tensor::cat(parts, 0),
        }
    }
}

impl Part {
    fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }
}

/// Every tensor of the model, block by block. Lazy: a configuration from a file may ask for any number of blocks.
pub(crate) fn entries(config: &VesperConfig) -> impl Iterator<Item = Entry> + '_ {
    let (vocab, d) = (config.vocab_size, config.hidden_size);
    let head = (!config.tie_word_embeddings).then(|| Entry::single("lm_head.weight".into(), vec![vocab, d]));
    std::iter::once(Entry::single("model.embed_tokens.weight".into(), vec![vocab, d]))
        .chain((0..config.num_hidden_layers).flat_map(move |i| block(config, i)))
        .chain(std::iter::once(Entry::single("model.norm.weight".into(), vec![d])))
        .chain(head)
}

fn block(config: &VesperConfig, i: usize) -> Vec<Entry> {
    let d = config.hidden_size;
    let prefix = format!("model.layers.{i}");
    let part = |projection: Projection| {
        let (input, output) = config.projection_size(projection);
        Part { name: format!("{prefix}.{}.weight", projection.path()), shape: vec![output, input] }
    };
    let single = |projection: Projection| {
        let part = part(projection);
        Entry::single(part.name, part.shape)
    };
    let mut entries = vec![
        Entry::single(format!("{prefix}.input_layernorm.weight"), vec![d]),
        Entry::packed(
            format!("{prefix}.self_attn.qkv_proj.weight"),
            [Projection::QProj, Projection::KProj, Projection::VProj].map(part).into(),
            d,
        ),
        single(Projection::OProj),
        Entry::single(format!("{prefix}.post_attention_layernorm.weight"), vec![d]),
        Entry::packed(
            format!("{prefix}.mlp.gate_up_proj.weight"),
            [Projection::GateProj, Projection::UpProj].map(part).into(),
            d,
        ),
        single(Projection::DownProj),
    ];
    if let Some(adapter) = &config.adapter {
        for &target in &adapter.targets {
            let (input, output) = config.projection_size(target);
            let (r, path) = (adapter.lora.r, target.path());
            entries.push(Entry::single(format!("{prefix}.{path}.lora_A.weight"), vec![r, input]));
            entries.push(Entry::single(format!("{prefix}.{path}.lora_B.weight"), vec![output, r]));
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn config() -> VesperConfig {
        VesperConfig::preset("nano").unwrap().with_kv_heads(2)
    }

    #[test]
    fn the_entries_hold_exactly_the_models_parameters() {
        for tied in [true, false] {
            let config = VesperConfig { tie_word_embeddings: tied, ..config() };
            let in_memory: usize = entries(&config).map(|entry| entry.shape.iter().product::<usize>()).sum();
            let on_disk: usize = entries(&config)
                .flat_map(|entry| entry.parts)
                .map(|part| part.shape.iter().product::<usize>())
                .sum();
            assert_eq!((in_memory, on_disk), (config.num_parameters(), config.num_parameters()));
        }
    }

    #[test]
    fn queries_come_before_keys_before_values_and_gates_before_ups() {
        let config = config();
        let entries: Vec<Entry> = entries(&config).collect();
        let names = |name: &str| {
            let entry = entries.iter().find(|entry| entry.name == name).unwrap();
            entry.parts.iter().map(|part| (part.name.clone(), part.shape.clone())).collect::<Vec<_>>()
        };
        assert_eq!(
            names("model.layers.3.self_attn.qkv_proj.weight"),
            [
                ("model.layers.3.self_attn.q_proj.weight".into(), vec![160, 160]),
                ("model.layers.3.self_attn.k_proj.weight".into(), vec![80, 160]),
                ("model.layers.3.self_attn.v_proj.weight".into(), vec![80, 160]),
            ]
        );
        assert_eq!(
            names("model.layers.0.mlp.gate_up_proj.weight"),
            [
                ("model.layers.0.mlp.gate_proj.weight".into(), vec![448, 160]),
                ("model.layers.0.mlp.up_proj.weight".into(), vec![448, 160]),
            ]
        );
    }

    #[test]
    fn packing_undoes_unpacking() {
        let config = config();
        for entry in entries(&config).take(8) {
            let count: usize = entry.shape.iter().product();
            let tensor = Tensor::arange(0u32, count as u32, &Device::Cpu).unwrap();
            let tensor = tensor.reshape(entry.shape.as_slice()).unwrap().to_dtype(DType::F32).unwrap();
            let parts = entry.unpack(&tensor).unwrap();
            for (part, info) in parts.iter().zip(&entry.parts) {
                assert_eq!(part.dims(), info.shape, "{}", info.name);
            }
            let packed = Entry::pack(&parts).unwrap();
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(packed.dims(), tensor.dims());
            assert_eq!(bits(&packed), bits(&tensor));
        }
    }
}
