"""Fine-tune a GLM-Edge chat model on your conversations.

\b
One process (a GPU, or the CPU for the embedded model):
    python finetune.py data/demo glm-edge-nano configs/demo.yaml

\b
Eight GPUs of one machine:
    OMP_NUM_THREADS=1 torchrun --standalone --nnodes=1 --nproc_per_node=8 \\
        finetune.py data/AdvertiseGen/ THUDM/glm-edge-4b-chat configs/lora.yaml

\b
Continue from the newest checkpoint, or from checkpoint 600:
    python finetune.py data/demo glm-edge-nano configs/demo.yaml yes
    python finetune.py data/demo glm-edge-nano configs/demo.yaml 600
"""

from glm_edge_ft import cli

app = cli.make_app(__doc__, takes_images=False)

if __name__ == "__main__":
    app()
