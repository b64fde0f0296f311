"""Fine-tune a GLM-Edge-V vision model on your conversations about images.

\b
One process (a GPU, or the CPU for the embedded model):
    python finetune_vision.py data/demo_vision glm-edge-v-nano configs/demo_vision.yaml

\b
Eight GPUs of one machine:
    OMP_NUM_THREADS=1 torchrun --standalone --nnodes=1 --nproc_per_node=8 \\
        finetune_vision.py data/CogVLM-311K/ THUDM/glm-edge-v-5b configs/lora.yaml

\b
Continue from the newest checkpoint, or from checkpoint 600:
    python finetune_vision.py data/demo_vision glm-edge-v-nano configs/demo_vision.yaml yes
    python finetune_vision.py data/demo_vision glm-edge-v-nano configs/demo_vision.yaml 600
"""

from glm_edge_ft import cli

app = cli.make_app(__doc__, takes_images=True)

if __name__ == "__main__":
    app()
